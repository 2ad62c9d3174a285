"""What the tests share that run in every rank of a world, as `tests/test_dist.py` starts it."""

import datetime
import os
from collections.abc import Iterator

import pytest

from tests.support.watchdog import STALL_S

# Plain pytest must not collect these modules: they need the other processes.
IN_A_WORLD = "LOCAL_WORLD_SIZE" in os.environ
collect_ignore_glob = [] if IN_A_WORLD else ["test_*.py"]

if IN_A_WORLD:
    # Before any test module imports megatron.
    import tests.support.megatron_cpu  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what looks back on all other tests after them."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    """Connect the processes once; they wait for each other for longer than the watchdog does."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2 * STALL_S))
    yield
    dist.destroy_process_group()
