"""What several files of tests start from."""

from pathlib import Path

import pytest

from tests.tiny import train


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the worlds, which take longest: workers are given files in this order."""
    items.sort(key=lambda item: item.path.name != "test_dist.py")


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
