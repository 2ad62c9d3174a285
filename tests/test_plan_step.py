"""A step of a plan: as few microbatches as show what all of them do."""

import itertools
from collections.abc import Sequence
from unittest import mock

import pytest

from tests.support import forked
from tests.support.plans import EXPERTS, planned


def planned_whole(rank: int, world_size: int, flags: Sequence[str]) -> object:
    """Plan a rank with every microbatch of its step."""
    from megalora.plan import step
    from tests.support.plans import COMMON, SIZES, plan_here

    with mock.patch.object(step, "_runs", lambda args, wanted: [step._Run(wanted, None)]):
        return plan_here(rank, world_size, (*COMMON, *SIZES, *flags), None)


STAGES = ("--pipeline-model-parallel-size", "8", "--num-layers", "8", "--global-batch-size", "12")
VIRTUAL = (
    *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    *("--num-layers", "4", "--global-batch-size", "8"),
)


@pytest.mark.parametrize(
    ("rank", "world_size", "flags"),
    [
        *((rank, 8, STAGES) for rank in (0, 4, 5, 7)),
        (
            0,
            8,
            (
                *STAGES,
                "--recompute-granularity",
                "full",
                "--recompute-method",
                "uniform",
                "--recompute-num-layers",
                "1",
            ),
        ),
        (0, 8, (*STAGES, *EXPERTS)),
        (0, 8, (*STAGES, "--global-batch-size", "4")),
        (1, 16, (*STAGES, "--tensor-model-parallel-size", "2", "--sequence-parallel")),
        (0, 2, VIRTUAL),
        (0, 1, ()),
    ],
)
def test_few_microbatches_say_what_all_hold_and_send(
    rank: int, world_size: int, flags: tuple[str, ...]
) -> None:
    few = planned(rank, world_size, *flags)
    whole = forked.call(planned_whole, rank, world_size, flags)
    assert few.step.microbatches < whole.step.microbatches or whole.step.microbatches <= 4
    assert (few.step.before, few.step.peak) == (whole.step.before, whole.step.peak)
    assert sorted(map(str, few.traffic)) == sorted(map(str, whole.traffic))
    assert few.work == whole.work


def test_a_stage_holds_more_the_more_follow_it() -> None:
    held = [planned(rank, 8, *STAGES).memory.activations for rank in (1, 2, 3, 4)]
    steps = {a - b for a, b in itertools.pairwise(held)}
    assert len(steps) == 1
    assert steps.pop() > 0
