"""What several files of tests start from."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import train

# Workers are given them in this order, before all others: what takes longest must not be last.
LONGEST = ["test_dist", "test_checkpoint_resume", "test_checkpoint_faults", "test_gpu_check"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file of tests to one worker, for the file's fixtures; but the worlds one by one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_dist.py" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have recorded to be read: a name and lines."""
    for report in terminalreporter.getreports("passed"):
        for name, lines in report.user_properties:
            terminalreporter.section(name)
            terminalreporter.write_line(lines)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense base that one step of full training saved. Nothing may write there."""
    directory = tmp_path_factory.mktemp("dense") / "base"
    train(1, directory, "--no-save-optim", iters=1).succeed()
    return directory


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the `datasets` library writes to the test, and the library from the network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
