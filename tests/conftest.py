"""What several files of tests start from."""

from pathlib import Path

import pytest

from tests.tiny import train


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense base that one step of full training saved. Nothing may write there."""
    directory = tmp_path_factory.mktemp("dense") / "base"
    train(1, directory, "--no-save-optim", iters=1).succeed()
    return directory
