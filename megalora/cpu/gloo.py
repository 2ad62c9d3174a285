"""What Megatron asks of NCCL and gloo does not have."""

import datetime
import functools
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megalora.replace import Patch, around

# By ranks, time limit and whether only members take part: the groups of this world.
_groups: dict[tuple[object, ...], ProcessGroup] = {}


def init_gloo(
    init_process_group: Callable[..., None],
    backend: object = None,
    *args: object,
    **kwargs: object,
) -> None:
    """Start the world on gloo, whatever backend is asked for."""
    for nccl_only in ("device_id", "pg_options"):
        kwargs.pop(nccl_only, None)
    init_process_group("gloo", *args, **kwargs)


def new_shared_group(
    new_group: Callable[..., ProcessGroup],
    ranks: Iterable[int] | None = None,
    timeout: datetime.timedelta | None = None,
    backend: object = None,
    pg_options: object = None,
    use_local_synchronization: bool = False,
    **kwargs: object,
) -> ProcessGroup:
    """Make one gloo group for each set of ranks, which all who ask for these ranks get.

    Megatron asks for some eighteen groups, most of them of the same few sets of ranks, and forgets
    them without freeing them; a gloo group is three threads that never sleep for long. One is
    enough: a single thread of each rank issues the collectives, in an order that all members share.
    A group lives as long as the world: its members cannot tell the other ranks, which must agree on
    what `new_group` makes, that they have destroyed it.
    """
    # What ranks that are not members do differs with local synchronization.
    key = (None if ranks is None else tuple(ranks), timeout, use_local_synchronization)
    if key not in _groups:
        kwargs["use_local_synchronization"] = use_local_synchronization
        _groups[key] = new_group(ranks, timeout=timeout, backend="gloo", **kwargs)
    return _groups[key]


def destroy_world(
    destroy_process_group: Callable[[ProcessGroup | None], None], group: ProcessGroup | None = None
) -> None:
    """Destroy the world and all groups, or a group that is not shared."""
    if group is None or group is dist.group.WORLD:
        _groups.clear()
        destroy_process_group(group)
    elif group not in _groups.values():
        destroy_process_group(group)


def isend_copy(
    isend: Callable[..., dist.Work | None], tensor: torch.Tensor, *args: object, **kwargs: object
) -> dist.Work | None:
    """Send a copy.

    gloo sends straight from the tensor's memory, and the pipeline schedules free an output as soon
    as isend returns (`deallocate_output_tensor`): without a copy messages arrive corrupted.
    """
    return isend(tensor.detach().clone(), *args, **kwargs)


def all_gather_uneven(
    all_gather: Callable[..., dist.Work | None],
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Gather shards, of unequal length too, which ETP with experts apart makes."""
    lengths = [shard.shape[0] if shard.dim() else 1 for shard in tensor_list]
    if len(set(lengths)) == 1:
        return all_gather(tensor_list, tensor, group=group, async_op=async_op)
    _refuse_async("all_gather", async_op)
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in lengths]
    all_gather(gathered, padded, group=group)
    for shard, buffer, length in zip(tensor_list, gathered, lengths, strict=True):
        shard.copy_(buffer[:length])
    return None


def reduce_scatter_uneven(
    reduce_scatter: Callable[..., dist.Work | None],
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Reduce and scatter shards, of unequal length too."""
    lengths = [shard.shape[0] for shard in input_list]
    if len(set(lengths)) == 1:
        return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    _refuse_async("reduce_scatter", async_op)
    total = torch.cat(input_list)
    dist.all_reduce(total, op=op, group=group)
    output.copy_(total.split(lengths)[dist.get_rank(group)])
    return None


def _refuse_async(name: str, async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(f"asynchronous {name} of unequal shards on gloo")


def all_reduce_average(
    all_reduce: Callable[..., dist.Work | None],
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Do ReduceOp.AVG as a sum of parts divided by the group's size."""
    if op == dist.ReduceOp.AVG:
        tensor.div_(dist.get_world_size(group))
        op = dist.ReduceOp.SUM
    return all_reduce(tensor, op=op, group=group, async_op=async_op)


def reduce_scatter_average(
    reduce_scatter_tensor: Callable[..., dist.Work | None],
    output: torch.Tensor,
    input: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Do ReduceOp.AVG as a sum of parts divided by the group's size."""
    if op == dist.ReduceOp.AVG:
        input = input / dist.get_world_size(group)
        op = dist.ReduceOp.SUM
    return reduce_scatter_tensor(output, input, op=op, group=group, async_op=async_op)


_ROWS: tuple[tuple[str, tuple[str, ...], Callable[..., object], str], ...] = (
    ("init_process_group", ("backend",), init_gloo, "there is no NCCL"),
    (
        "new_group",
        ("ranks", "timeout", "backend", "use_local_synchronization"),
        new_shared_group,
        "there is no NCCL; groups of the same ranks share their three threads",
    ),
    ("destroy_process_group", ("group",), destroy_world, "shared groups live as long as the world"),
    ("isend", ("tensor",), isend_copy, "gloo sends from memory that the pipeline schedules free"),
    (
        "all_gather",
        ("tensor_list", "tensor", "group", "async_op"),
        all_gather_uneven,
        "gloo takes no shards of unequal length",
    ),
    (
        "reduce_scatter",
        ("output", "input_list", "op", "group", "async_op"),
        reduce_scatter_uneven,
        "gloo takes no shards of unequal length",
    ),
    (
        "all_reduce",
        ("tensor", "op", "group", "async_op"),
        all_reduce_average,
        "gloo has no average",
    ),
    (
        "reduce_scatter_tensor",
        ("output", "input", "op", "group", "async_op"),
        reduce_scatter_average,
        "gloo has no average",
    ),
)
# Where users find a collective, and where torch.distributed itself looks it up.
PATCHES = tuple(
    Patch(owner, name, needs, wrap, why)
    for name, needs, wrapper, why in _ROWS
    for wrap in (functools.cache(around(wrapper)),)
    for owner in (dist, dist.distributed_c10d)
)
