"""Collectives that start before a base linear and finish after it.

A `Pending` holds a result that may still be travelling; `wait` returns it. On NCCL, waiting makes
the current stream wait, not the host, so work queued between start and wait overlaps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Collective(Enum):
    """How a tensor of tokens [n, r] travels between the shrink and the expand."""

    NONE = "none"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"


@dataclass(slots=True)
class Pending:
    """A tensor on its way: `finish` gives it once `work` is done."""

    finish: Callable[[], Tensor]
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Return the tensor, complete in the order of the current stream."""
        if self.work is not None:
            self.work.wait()
        return self.finish()


def done(tensor: Tensor) -> Pending:
    """Return a tensor that does not travel."""
    return Pending(lambda: tensor)


def start_collective(tensor: Tensor, collective: Collective, group: ProcessGroup | None) -> Pending:
    """Start a collective over the first dimension.

    tensor: [n, ...] for all-gather (result [t n, ...]) and all-reduce (in place),
    [t n, ...] for reduce-scatter (result [n, ...]).
    """
    if collective is Collective.NONE or (size := group_size(group)) == 1:
        return done(tensor)
    tensor = tensor.contiguous()
    tail = tensor.shape[1:]
    if collective is Collective.ALL_REDUCE:
        return Pending(lambda: tensor, dist.all_reduce(tensor, group=group, async_op=True))
    if collective is Collective.ALL_GATHER:
        out = tensor.new_empty(tensor.shape[0] * size, *tail)
        work = dist.all_gather_into_tensor(out, tensor, group=group, async_op=True)
    else:
        out = tensor.new_empty(tensor.shape[0] // size, *tail)
        work = dist.reduce_scatter_tensor(out, tensor, group=group, async_op=True)
    return Pending(lambda: out, work)


def start_gather(shard: Tensor, dim: int, group: ProcessGroup | None) -> Pending:
    """Start gathering a factor from its shards along `dim` (negative), in rank order."""
    size = group_size(group)
    if size == 1:
        return done(shard)
    shard = shard.contiguous()
    stacked = shard.new_empty(size * shard.shape[0], *shard.shape[1:])
    work = dist.all_gather_into_tensor(stacked, shard, group=group, async_op=True)

    def unstack() -> Tensor:
        shards = stacked.view(size, *shard.shape)
        return shards.movedim(0, dim - 1).flatten(dim - 1, dim)

    return Pending(unstack, work)


def start_reduce_scatter(full: Tensor, dim: int, group: ProcessGroup | None) -> Pending:
    """Start summing a factor's gradient over the group, keeping this rank's shard along `dim`."""
    size = group_size(group)
    if size == 1:
        return done(full)
    shards = full.unflatten(dim, (size, full.shape[dim] // size)).movedim(dim - 1, 0).contiguous()
    out = full.new_empty(shards.shape[1:])
    work = dist.reduce_scatter_tensor(
        out.view(-1, *out.shape[1:]), shards.flatten(0, 1), group=group, async_op=True
    )
    return Pending(lambda: out, work)


def own_shard(full: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """Return the view of this rank's shard of `full` along `dim`."""
    size = group_size(group)
    if size == 1:
        return full
    width = full.shape[dim] // size
    return full.narrow(dim, dist.get_rank(group) * width, width)


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group; no group is one rank."""
    return 1 if group is None else group.size()


class GatherFactor(torch.autograd.Function):
    """Gather a factor once for many uses.

    forward: all-gather of the shards along `dim`; wgrad: reduce-scatter of the summed gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, shard: Tensor, dim: int, group: ProcessGroup | None
    ) -> Tensor:
        """Return the whole factor."""
        ctx.dim, ctx.group = dim, group
        return start_gather(shard, dim, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        """Return this rank's shard of the gradient that all uses on all ranks add up to."""
        return start_reduce_scatter(grad, ctx.dim, ctx.group).wait(), None, None
