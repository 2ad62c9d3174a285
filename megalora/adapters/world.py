"""What ranks tell each other, at a cost that does not grow with how many they are.

A number goes through an all-reduce. Of words, whoever has new ones speaks in turn: equal ranks are
heard once. An all-gather of objects, of which every rank unpickles those of all, is for a small
group, or for what went wrong.
"""

import pickle
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.collectives import group_size


def device_of(group: ProcessGroup | None = None) -> torch.device:
    """Return where tensors must be that a group (default: all ranks) sends: NCCL's on the GPU."""
    has_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())


def first_rank(speaks: bool, group: ProcessGroup | None = None) -> int | None:
    """Return the first rank, as the group counts them, that has something to say.

    None where none has. All ranks of the group must call it: an all-reduce of 8 bytes.
    """
    size = dist.get_world_size(group)
    number = dist.get_rank(group) if speaks else size
    first = torch.tensor(number, device=device_of(group))
    dist.all_reduce(first, dist.ReduceOp.MIN, group)
    return None if int(first) == size else int(first)


def sent_by(speaker: int, tensor: Tensor, group: ProcessGroup) -> None:
    """Fill a tensor with that of one rank of a group, as the group counts them.

    By way of the GPU where the group sends from nowhere else: with --use-cpu-initialization a model
    is on the CPU until it is wrapped.
    """
    if f"{tensor.device.type}:" in dist.get_backend_config(group):
        dist.broadcast(tensor, group=group, group_src=speaker)
        return
    passing = tensor.to(device_of(group), copy=True)
    dist.broadcast(passing, group=group, group_src=speaker)
    tensor.copy_(passing)


def told_by[T](speaker: int, value: T, group: ProcessGroup | None = None) -> T:
    """Return the value of one rank, as the group counts them, on all; it must be pickled."""
    told = [value]
    dist.broadcast_object_list(told, group=group, group_src=speaker)
    return told[0]


def union[T](names: set[T], group: ProcessGroup | None) -> set[T]:
    """Return the names of all ranks of a group together; all of them must call it.

    Three collectives for each rank that has names which none before it had: pipeline stages differ,
    their replicas do not.
    """
    if group_size(group) == 1:
        return names
    known: set[T] = set()
    while (speaker := first_rank(not names <= known, group)) is not None:
        known |= told_by(speaker, names - known, group)
    return known


def rare_names(names: set[str]) -> set[str]:
    """Return the names of all ranks together, of which there are none where all is well.

    All ranks must call it. Without any it is an all-reduce of 8 bytes, else an all-gather.
    """
    if first_rank(bool(names)) is None:
        return set()
    everywhere: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, names)
    return set().union(*everywhere)


def summed(numbers: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the sums over the ranks of a group of each number, in fp64 on the CPU."""
    total = numbers.to(device_of(group), torch.float64, copy=True)
    dist.all_reduce(total, group=group)
    return total.cpu()


def largest(numbers: Sequence[float], group: ProcessGroup | None = None) -> list[float]:
    """Return the largest of all ranks of a group of each number, which fp64 must hold."""
    most = torch.tensor(numbers, dtype=torch.float64, device=device_of(group))
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return most.tolist()


def told_by_each[T](number: int | None, value: T, count: int) -> list[T]:
    """Return what `count` ranks of all have each, in the order of their numbers, on all ranks.

    number: 0 to count - 1, each on one rank; None on those that have nothing to tell. value: of the
    others nothing is read; it must be pickled. Two all-reduces, of no more than what is told.
    """
    own = b"" if number is None else pickle.dumps(value)
    device = device_of()
    sizes = torch.zeros(count, dtype=torch.int64, device=device)
    if number is not None:
        sizes[number] = len(own)
    dist.all_reduce(sizes)
    ends = sizes.cumsum(0).tolist()
    told = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
    if number is not None:
        start = ends[number] - len(own)
        told[start : ends[number]] = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    dist.all_reduce(told)
    data = told.cpu().numpy().tobytes()
    return [pickle.loads(data[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
