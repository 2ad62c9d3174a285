"""Run pytest on the arguments, as each rank of the distributed tests does."""

import sys

import pytest

sys.exit(pytest.main(sys.argv[1:]))
