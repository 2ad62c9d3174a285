"""What the replicas of a model have each, brought together on all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from megalora.adapters import world
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
        number = self.number if self.speaks else None
        return world.told_by_each(number, cast("T", own), self.count)

    def largest(self, value: float) -> float:
        """Return the largest value of all ranks, which must all call it."""
        return world.largest([value])[0]
