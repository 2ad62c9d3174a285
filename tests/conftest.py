"""What several files of tests start from."""

from pathlib import Path

import pytest

from tests.tiny import train

# Workers are given them in this order, before all others: what takes longest must not be last.
LONGEST = ["test_dist", "test_checkpoint_resume", "test_checkpoint_faults", "test_gpu_check"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file of tests to one worker, for its fixtures; but the worlds one by one."""
    items.sort(key=_place)
    for item in items:
        group = item.nodeid if item.path.stem == "test_dist" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def _place(item: pytest.Item) -> int:
    stem = item.path.stem
    return LONGEST.index(stem) if stem in LONGEST else len(LONGEST)


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
