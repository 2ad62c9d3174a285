"""What several files of tests start from."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.durations import WORLD
from tests.support.parts import WORKERS
from tests.support.tiny import train

# Files whose tests share no fixture that takes long: each may come to another worker.
CUT = ("test_dist", "test_launch_examples")
# The mark of tests that are more seeds or more sizes of others: `make test-full` runs them.
FULL = "full"
# What takes longest, by parts of names: of files, or of tests that may come to any worker.
LONGEST = [
    "distributed_tests[2-",
    "test_gpu_check",
    "distributed_tests[4-",
    "test_launch_examples",
    "test_checkpoint_faults",
    "distributed_tests[1-",
    "test_cuda_kernels",
    "test_types",
    "test_checkpoint_resume",
    "test_rl_lora",
    "test_checkpoint_async",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for `-m full` alone, and start with what takes longest."""
    if FULL not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker(FULL)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(FULL)]
    units: dict[str, list[pytest.Item]] = {}
    for item in items:
        units.setdefault(_unit(item.nodeid), []).append(item)
    items[:] = [item for unit in in_turn(list(units), WORKERS) for item in units[unit]]


def _unit(nodeid: str) -> str:
    """Name what one worker runs: a file of tests, for the file's fixtures, or a test alone."""
    file = nodeid.partition("::")[0]
    return nodeid if Path(file).stem in CUT else file


def in_turn(units: list[str], workers: int) -> list[str]:
    """Return the units as workers are to be given them: what takes longest must not be last.

    A worker is given a second one while its first still runs. Of two workers the one with the world
    of two processes gets that of four: beside each other they wait for cores. Of more, none may
    have two that take long.
    """
    long = [unit for name in LONGEST for unit in units if name in unit]
    others = [unit for unit in units if unit not in long]
    if workers <= 2:
        return [*long, *others]
    return [*long[:workers], *others[:workers], *long[workers:], *others[workers:]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a unit of tests at a time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in a line each what ran in worlds of ranks, and why tests were skipped."""
    for report in terminalreporter.getreports("passed"):
        for tests in (json.loads(v) for name, v in report.user_properties if name == WORLD):
            if tests:
                name, took = report.nodeid.partition("::")[2], report.duration
                terminalreporter.write_line(f"{len(tests):5} passed in {took:.0f} s  {name}")
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    for reason, number in sorted(reasons.items()):
        terminalreporter.write_line(f"{number:5} {reason[0].lower()}{reason[1:]}")


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
