"""What the tests share that run in every rank of a world, as `tests/test_dist.py` starts it."""

import datetime
import os
from collections.abc import Iterator

import pytest

from tests.support.parts import in_part
from tests.support.watchdog import STALL_S

# Plain pytest must not collect these modules: they need the other processes.
IN_A_WORLD = "LOCAL_WORLD_SIZE" in os.environ
collect_ignore_glob = [] if IN_A_WORLD else ["test_*.py"]

if IN_A_WORLD:
    # Before any test module imports megatron.
    import tests.support.megatron_cpu  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a world be run in parts, which may run beside each other."""
    parser.addoption("--part", default="1/1", help="which part of the tests to run, as 2/4")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of this part, and run what looks back on all other tests after them."""
    last = [item for item in items if item.get_closest_marker("last")]
    kept = in_part(items, config.getoption("part", "1/1"), last)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let a world pass that has no more sizes of its tests."""
    if (
        exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        and "full" in session.config.option.markexpr
    ):
        session.exitstatus = 0


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    """Connect the processes once; they wait for each other for longer than the watchdog does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2 * STALL_S))
    yield
    dist.destroy_process_group()
