"""Run the distributed tests: one start of the ranks for each world size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forked import SCRIPT, Ranks
from tests.support.watchdog import tail_of_logs

PYTEST = SCRIPT.with_name("run_pytest.py")
TESTS = Path(__file__).parent / "dist"
OPTIONS = [
    # -x: after a failure, a rank's next collective would pair with a stale one of another.
    # -v: every test that starts is written at once, which the watchdog takes for progress.
    *("-x", "-v", "-p", "no:cacheprovider"),
    # It collects garbage five times at the end, among all that Megatron and torch have imported.
    *("-p", "no:unraisableexception"),
    # Where each rank stands, before the watchdog ends them.
    *("-o", "faulthandler_timeout=120"),
    # Megatron's own warnings would hide the failure.
    "--disable-warnings",
]


@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_every_rank_passes_its_distributed_tests(
    world_size: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    arguments = [TESTS, "-m", f"world_{world_size}", *OPTIONS]
    world = Ranks(world_size, arguments, tmp_path, script=PYTEST, by_megalora=False)
    if any(world.wait()):
        pytest.fail(tail_of_logs(tmp_path), pytrace=False)
    record_property(f"slowest in a world of {world_size}", slowest(world.logs[0].read_text()))


def slowest(log: str) -> str:
    """Return pytest's table of durations."""
    return log.split("slowest 20 durations")[1].partition("\n")[2].split("\n\n")[0].split("\n==")[0]
