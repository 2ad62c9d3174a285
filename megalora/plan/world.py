"""A world of any size in one process: torch's fake process group, whose collectives do nothing.

Each call returns at once with what this rank sent: shapes are right, numbers are not.
"""

import datetime
import functools
import inspect
import os
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalora import cpu, replace
from megalora.cpu import gloo
from megalora.plan.engine import tree
from megalora.replace import Patch, around

_BACKEND = "cpu:fake,meta:fake"


def become(rank: int, world_size: int, *, gpus_per_node: int = 8) -> None:
    """Give this process the environment that torchrun gives a rank; nothing is started."""
    local = min(gpus_per_node, world_size)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % local),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }


@functools.cache
def install() -> None:
    """Let Megatron run without a GPU and without any other rank.

    Where it is not imported yet, it finds TransformerEngine's layers, as shapes. Where it is, for a
    run on the CPU, which this process then is not, it has what it found.
    """
    if not cpu.installed():
        tree.install()
        cpu.install(PATCHES, has_kernels=True)
        return
    for patch in gloo.PATCHES:
        setattr(patch.owner, patch.name, inspect.unwrap(getattr(patch.owner, patch.name)))
    replace.install(PATCHES)


def init_fake(init_process_group: Callable[..., None], *args: object, **kwargs: object) -> None:
    """Start the world of the environment, without a peer."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=size)


def new_fake_group(
    new_group: Callable[..., ProcessGroup],
    ranks: Iterable[int] | None = None,
    timeout: datetime.timedelta | None = None,
    backend: object = None,
    pg_options: object = None,
    use_local_synchronization: bool = False,
    **kwargs: object,
) -> ProcessGroup | int:
    """Make a group that this rank belongs to; of the others nothing but that they are others'."""
    if ranks is not None:
        ranks = list(ranks)
        if dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
    return new_group(ranks, backend=_BACKEND, **kwargs)


def keep_objects(
    broadcast_object_list: Callable[..., None],
    object_list: list[object],
    *args: object,
    **kwargs: object,
) -> None:
    """Leave what a rank would be told as it is."""


_ROWS: tuple[tuple[str, tuple[str, ...], Callable[..., object], str], ...] = (
    ("init_process_group", ("backend",), init_fake, "there is one process"),
    ("new_group", ("ranks", "timeout", "backend"), new_fake_group, "there is one process"),
    ("broadcast_object_list", ("object_list",), keep_objects, "nobody tells this rank anything"),
)
PATCHES = tuple(
    Patch(owner, name, needs, around(wrapper), why)
    for name, needs, wrapper, why in _ROWS
    for owner in (dist, dist.distributed_c10d)
)
