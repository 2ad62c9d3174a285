"""What a plan says and proposes, without a rank to plan: sentences, changes, whom it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.plan import fit
from megalora.plan.facts import Batch, Choices, Facts, Layout
from megalora.plan.refusal import refusal

LAYOUT = Layout(
    world_size=64,
    tensor=2,
    sequence_parallel=False,
    pipeline=2,
    virtual=1,
    context=1,
    expert=4,
    expert_tensor=1,
    data=16,
    stages_before_data=False,
)
FACTS = Facts(
    layout=LAYOUT,
    batch=Batch(micro=2, whole=64, microbatches=2, sequence_length=128),
    choices=Choices(distributed_optimizer=False, recompute="", experts=8, latent=False),
    learning_rate=None,
    adapters=None,
    notes=(),
)


def offered(facts: Facts) -> list[str]:
    return [" ".join(change.flags) for change in fit.changes(facts, 8)]


def test_changes_come_cheapest_first() -> None:
    assert offered(FACTS) == [
        "--use-distributed-optimizer",
        "--sequence-parallel",
        "--recompute-granularity selective --recompute-modules layernorm moe_act",
        "--recompute-granularity selective --recompute-modules moe mlp",
        "--micro-batch-size 1",
        "--expert-model-parallel-size 8",
        "--tensor-model-parallel-size 4 --sequence-parallel",
        "--pipeline-model-parallel-size 4",
        "--context-parallel-size 2",
        " ".join(fit._FULL),
        f"{' '.join(fit._FULL)} --distribute-saved-activations",
    ]


def test_what_a_run_has_already_is_not_offered() -> None:
    layout = replace(LAYOUT, tensor=8, data=1, sequence_parallel=True, expert=8, pipeline=8)
    choices = replace(FACTS.choices, distributed_optimizer=True, recompute="full")
    batch = replace(FACTS.batch, micro=1)
    assert offered(replace(FACTS, layout=layout, choices=choices, batch=batch)) == []


@pytest.mark.parametrize(
    ("stage", "stages", "wider", "rank"),
    [(0, 2, 4, 0), (1, 2, 4, 48), (1, 4, 8, 16), (3, 4, 8, 56)],
)
def test_a_stage_has_its_place_among_more(stage: int, stages: int, wider: int, rank: int) -> None:
    assert fit._rank(replace(LAYOUT, pipeline=wider), stage, stages) == rank


def test_stages_that_follow_each_other_are_found_too() -> None:
    layout = replace(LAYOUT, stages_before_data=True, context=2, pipeline=4)
    assert [layout.first_of(stage) for stage in range(4)] == [0, 4, 8, 12]


def test_changes_that_do_not_do_alone_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks add up here: of ten, each of three changes takes two, and one of Megatron's refuses."""
    saved = {"--use-distributed-optimizer": 2, "--sequence-parallel": 2, "--micro-batch-size": 2}

    class Plan:
        def __init__(self, flags: tuple[str, ...]) -> None:
            self.memory: Any = self
            self.place: Any = self
            self.pipeline, self.rank = 0, 0
            self.peak = 10 - sum(saved.get(flag, 0) for flag in flags)

    def tried(job: object, changes: Any, stage: object) -> list[Any]:
        refused = "--pipeline-model-parallel-size"
        return [(one, Plan(one.flags)) for one in changes if refused not in one.flags]

    monkeypatch.setattr(fit, "_tried", tried)
    planned: Any = type("Planned", (), {"facts": FACTS, "fullest": Plan(())})
    job: Any = type("Job", (), {"gpus_per_node": 8})

    def flags(memory: int) -> list[str]:
        return [" ".join(one.flags) for one in fit.proposals(job, planned, memory)]

    assert flags(8) == [
        "--use-distributed-optimizer",
        "--sequence-parallel",
        "--micro-batch-size 1",
    ]
    assert flags(6) == ["--use-distributed-optimizer --sequence-parallel"]
    assert flags(4) == ["--use-distributed-optimizer --sequence-parallel --micro-batch-size 1"]
    assert flags(3) == []


# === What ends a rank ===


def raised(code: str, file: Path) -> BaseException:
    """Return what some code raises that is in a file."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    try:
        exec(compile(code, str(file), "exec"), {"args": type("args", (), {"heads": 3})})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("assert args.heads % 2 == 0, 'heads must be even'", "heads must be even (Megatron's own"),
        ("assert args.heads % 2 == 0", "it asks for `args.heads % 2 == 0` (Megatron's own check"),
        (
            "raise ValueError('no such flag')",
            "no such flag (Megatron's own check, megatron/a.py:1)",
        ),
    ],
)
def test_megatrons_own_checks_are_said_to_be_its_own(
    tmp_path: Path, code: str, sentence: str
) -> None:
    said, is_clear = refusal(raised(code, tmp_path / "megatron" / "a.py"))
    assert said.startswith(sentence)
    assert said.endswith("megatron/a.py:1)")
    assert is_clear


@pytest.mark.parametrize(
    ("folder", "code", "sentence", "is_clear"),
    [
        ("megatron", "raise RuntimeError('late')", "RuntimeError in megatron/a.py:1: late", False),
        ("other", "raise ValueError('field is 3')", "field is 3", True),
        ("other", "raise SystemExit('error: field is 3')", "field is 3", True),
        ("other", "raise SystemExit(3)", "3", False),
        ("other", "1 / 0", "ZeroDivisionError: division by zero (a.py:1)", False),
    ],
)
def test_other_ends_are_told_from_wrong_input(
    tmp_path: Path, folder: str, code: str, sentence: str, is_clear: bool
) -> None:
    assert refusal(raised(code, tmp_path / folder / "a.py")) == (sentence, is_clear)
