"""What the replicas of a model have each, brought together on all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist

from megalora.checkpoint.ranks import on_all_ranks


@dataclass(frozen=True)
class Replicas:
    """Of a rank: the number of its replica, how many there are, and whether it speaks for it.

    The ranks of a replica hold one model together; the first of them speaks.
    """

    number: int
    count: int
    speaks: bool

    def share[T](self, items: Sequence[T]) -> Sequence[T]:
        """Return this replica's part of the items of all, which must be as many for each."""
        size, rest = divmod(len(items), self.count)
        assert not rest
        return items[self.number * size : (self.number + 1) * size]

    def each[T](self, work: Callable[[], T]) -> list[T]:
        """Do something on the rank that speaks for each replica; return what all gave, in order.

        All ranks must call it. What must be pickled comes from ranks of this run alone. The first
        ValueError is raised on all ranks.
        """
        own = on_all_ranks(lambda: work() if self.speaks else None)
        told: list[tuple[int, T] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (self.number, own) if self.speaks else None)
        found = dict(cast("tuple[int, T]", one) for one in told if one is not None)
        return [found[number] for number in range(self.count)]

    def largest(self, value: float) -> float:
        """Return the largest value of all ranks, which must all call it."""
        told = [value] * dist.get_world_size()
        dist.all_gather_object(told, value)
        return max(told)
