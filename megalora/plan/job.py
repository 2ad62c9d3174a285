"""The ranks of a job that differ, and what all of them share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalora.plan.processes import FailedError, Failure, Job, plan_each

if TYPE_CHECKING:
    from megalora.plan.child import Answer
    from megalora.plan.facts import Facts
    from megalora.plan.rank import RankPlan
    from megalora.plan.ranks import Alike


@dataclass(frozen=True, slots=True)
class Planned:
    """The ranks of a job that differ, each with those that are as it is, and what all share."""

    job: Job
    facts: "Facts"
    ranks: list["RankPlan"]
    alike: list["Alike"]

    @property
    def fullest(self) -> "RankPlan":
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda plan: plan.memory.peak)

    def like(self, plan: "RankPlan") -> "Alike":
        """Return the ranks that a planned one stands for."""
        return next(one for one in self.alike if one.stage == plan.place.pipeline)


def plan_job(job: Job, *, only: int | None = None) -> Planned:
    """Plan each rank of a job that differs from the others, or one alone.

    Raises FailedError with the first sentence of those that cannot be planned.
    """
    first = _answered(job, [only or 0])[0]
    waiting = [] if only is not None else [one.rank for one in first.alike if one.rank]
    plans = [first.plan, *(one.plan for one in _answered(job, waiting))]
    return Planned(job, first.facts, plans, first.alike)


def _answered(job: Job, ranks: list[int]) -> "list[Answer]":
    answers: list[Answer] = []
    for found in plan_each([(job, rank) for rank in ranks]):
        if isinstance(found, Failure):
            raise FailedError(found)
        answers.append(found)
    return answers
