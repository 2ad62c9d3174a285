"""What pyright says of the package, beside the other tests instead of before them."""

import subprocess
import sys

from tests.support.forked import ROOT


def test_the_type_checker_finds_no_fault() -> None:
    command = [sys.executable, "-m", "pyright"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
