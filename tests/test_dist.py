"""Run the distributed tests: one start of the ranks for each world, or for each part of it."""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import durations
from tests.support.forked import SCRIPT, Ranks
from tests.support.parts import WORKERS, parts
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


@pytest.mark.parametrize(
    ("world_size", "part"), [(size, part) for size in (4, 2, 1) for part in parts(size, WORKERS)]
)
def test_every_rank_passes_its_distributed_tests(
    world_size: int, part: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run(world_size, f"world_{world_size}", part, tmp_path, record_property)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_every_rank_passes_the_distributed_tests_of_more_sizes(
    world_size: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run(world_size, f"world_{world_size} and full", "1/1", tmp_path, record_property)


@pytest.mark.full
@pytest.mark.transformer_engine
@pytest.mark.skipif("TEST_TRANSFORMER_ENGINE" not in os.environ, reason="not asked for")
@pytest.mark.parametrize("world_size", [2, 1])
def test_every_rank_passes_the_distributed_tests_of_transformer_engine_alone(
    world_size: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert find_spec("transformer_engine"), "asked for by TEST_TRANSFORMER_ENGINE: install it"
    run(world_size, f"world_{world_size} and transformer_engine", "1/1", tmp_path, record_property)


def run(
    world_size: int,
    marks: str,
    part: str,
    logs: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Run what has the marks on so many ranks, and tell how long each of the tests took."""
    arguments = [TESTS, "-m", marks, "--part", part, *OPTIONS]
    times = logs / "tests.xml"
    world = Ranks(
        world_size,
        arguments,
        logs,
        script=PYTEST,
        by_megalora=False,
        # Plugins such as hypothesis and xdist take each rank half a second to import.
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        own_flags={0: [f"--junitxml={times}"]},
    )
    if any(world.wait()):
        pytest.fail(tail_of_logs(logs), pytrace=False)
    took = [[round(test.seconds, 2), test.name] for test in durations.of(times)]
    record_property(durations.WORLD, json.dumps(took))
