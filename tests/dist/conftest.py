"""What the tests share that run in every process of a torchrun, as `tests/test_dist.py` starts."""

import datetime
import os
from collections.abc import Iterator

import pytest

# Plain pytest must not collect these modules: they need the other processes.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
collect_ignore_glob = [] if UNDER_TORCHRUN else ["test_*.py"]

if UNDER_TORCHRUN:
    # Before any test module imports megatron.
    import megalora.cpu
    import tests.mamba_on_cpu

    megalora.cpu.install()
    tests.mamba_on_cpu.install()


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    """Connect the processes once; one that waits two minutes for another fails."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=2))
    yield
    dist.destroy_process_group()
