"""What a rank is planned to send is what it sends: in all, for adapters, and by their routes."""

import pytest

from tests.dist.support import plans
from tests.dist.support.cases import (
    CP2,
    DP2,
    EP2,
    EP2_ETP2,
    ETP2,
    OVERLAPPED,
    PP2,
    RECOMPUTED,
    TP2,
    TP2_EP2,
    TP2_SP,
    Case,
)
from tests.dist.support.layouts import Layout, world
from tests.dist.support.training import Run

SPLIT = {"note": "distributed optimizer", "run": Run(distributed_optimizer=True)}
CASES = [
    (Case(layout=TP2), True),
    (Case(layout=TP2_SP), True),
    (Case(layout=TP2_SP), False),
    (Case(layout=TP2_SP, **RECOMPUTED), True),
    (Case(layout=PP2), True),
    (Case(layout=Layout(pp=2, vpp=2), kind="dense of 4 layers"), True),
    (Case(layout=CP2), True),
    (Case(layout=CP2, kind="gated delta nets"), True),
    (Case(layout=DP2, **OVERLAPPED), True),
    (Case(layout=DP2, **SPLIT), False),
    (Case(layout=EP2, kind="experts", **SPLIT), True),
    (Case(layout=TP2_EP2, kind="experts"), True),
    (Case(layout=ETP2, kind="shared-outer experts"), True),
    (Case(layout=EP2_ETP2, kind="experts", **OVERLAPPED), True),
    (Case(layout=Layout(tp=2, sp=True, pp=2), kind="tied embeddings"), True),
    (Case(layout=Layout(tp=2, sp=True, cp=2), kind="experts"), True),
]


@pytest.mark.parametrize(
    ("case", "lora"),
    [
        pytest.param(
            case, lora, id=f"{case}, {'LoRA' if lora else 'full'}", marks=world(case.layout)
        )
        for case, lora in CASES
    ],
)
def test_a_rank_sends_what_is_planned(case: Case, lora: bool) -> None:
    plan = plans.planned(case, lora)
    metered, adapters, asked = plans.ran(case, lora)
    assert plan.sent == metered
    assert plan.sent == asked
    assert plan.adapters == adapters
    by_size = {(kind, len(ranks)): number for (kind, ranks), number in adapters.items()}
    assert plans.by_contract(plan, recomputed="recompute" in case.note) == by_size
    assert sum(one.calls for one in plan.traffic) == sum(calls for calls, _ in metered.values())
