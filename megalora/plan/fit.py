"""Which flags would make a run fit: the fullest rank planned again with each of them.

In the order of what they cost in speed, as docs/planning.md explains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megalora.plan.facts import Choices, Facts, Layout
from megalora.plan.job import Planned
from megalora.plan.processes import Failure, Job, plan_each

if TYPE_CHECKING:
    from megalora.plan.rank import RankPlan

# So many are shown, and so many ranks are planned before it is asked whether they are found.
_ENOUGH, _AT_ONCE = 3, 4
_FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
_FULL += ("--recompute-num-layers", "1")


@dataclass(frozen=True, slots=True)
class Change:
    """Flags with which a rank holds less, what they cost, and the layout that they make."""

    flags: tuple[str, ...]
    cost: str
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A change with which the fullest rank fits: its flags, what they cost, the rank's peak."""

    flags: tuple[str, ...]
    cost: str
    rank: int
    peak: int


def changes(facts: Facts, gpus_per_node: int) -> Iterator[Change]:
    """Yield what could make a run hold less, cheapest first; Megatron may refuse some."""
    layout, choices, micro = facts.layout, facts.choices, facts.batch.micro
    if not choices.distributed_optimizer:
        yield Change(("--use-distributed-optimizer",), "no speed", layout)
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield Change(("--sequence-parallel",), "no speed", layout)
    if not choices.recompute:
        yield from _selective(layout, choices)
    if micro > 1 and micro % 2 == 0:
        flags = ("--micro-batch-size", str(micro // 2))
        yield Change(flags, "smaller products", layout)
    yield from _wider(layout, choices.experts, gpus_per_node)
    if choices.recompute != "full":
        yield Change(_FULL, "every layer computed twice", layout)
        if layout.tensor > 1 and not layout.sequence_parallel:
            flags = (*_FULL, "--distribute-saved-activations")
            yield Change(flags, "every layer computed twice, one all-gather more", layout)


def _selective(layout: Layout, choices: Choices) -> Iterator[Change]:
    """Yield what can be recomputed of a layer; with flash attention its core keeps little."""
    selective = ("--recompute-granularity", "selective", "--recompute-modules")
    small = ["layernorm", *["moe_act"] * (choices.experts > 0), *["mla_up_proj"] * choices.latent]
    yield Change((*selective, *small), "norms and functions computed twice", layout)
    if choices.experts:
        yield Change((*selective, "moe", "mlp"), "experts computed and sent to twice", layout)
    else:
        yield Change((*selective, "mlp"), "MLPs computed twice", layout)


def _wider(layout: Layout, experts: int, gpus_per_node: int) -> Iterator[Change]:
    """Yield the layouts with one kind of group twice as large."""
    if experts and layout.expert < experts:
        flags = ("--expert-model-parallel-size", str(2 * layout.expert))
        yield Change(flags, "tokens sent to more ranks", layout)
    if layout.data > 1:
        size = 2 * layout.tensor
        if size <= gpus_per_node:
            wider = replace(layout, tensor=size)
            flags = ("--tensor-model-parallel-size", str(size), "--sequence-parallel")
            yield Change(flags, "activations sent within a node", wider)
        size = 2 * layout.pipeline
        flags = ("--pipeline-model-parallel-size", str(size))
        yield Change(flags, "a longer pipeline", replace(layout, pipeline=size))
        size = 2 * layout.context
        flags = ("--context-parallel-size", str(size))
        yield Change(flags, "keys and values sent", replace(layout, context=size))


def proposals(job: Job, planned: Planned, memory: int) -> list[Proposal]:
    """Return changes with which the fullest rank holds no more than so many bytes, cheapest first.

    Each alone, until enough are found; where none fits, those that help, one after the other
    together. What Megatron refuses is left out.
    """
    fullest, facts = planned.fullest, planned.facts
    stage = fullest.place.pipeline, facts.layout.pipeline
    waiting = list(changes(facts, job.gpus_per_node))
    tried: list[tuple[Change, RankPlan]] = []
    fitting: list[tuple[Change, RankPlan]] = []
    while waiting and len(fitting) < _ENOUGH:
        tried += _tried(job, waiting[:_AT_ONCE], stage)
        fitting = _fitting(tried, memory)
        del waiting[:_AT_ONCE]
    if not fitting:
        helpful = [change for change, plan in tried if plan.memory.peak < fullest.memory.peak]
        together = [_joined(helpful[:number]) for number in range(2, len(helpful) + 1)]
        fitting = _fitting(_tried(job, together, stage), memory)[:1]
    return [
        Proposal(flags=change.flags, cost=change.cost, rank=plan.rank, peak=plan.memory.peak)
        for change, plan in fitting[:_ENOUGH]
    ]


def _tried(
    job: Job, wanted: Sequence[Change], stage: tuple[int, int]
) -> list[tuple[Change, "RankPlan"]]:
    """Plan the rank in the place of the fullest with each change; refused ones are left out."""
    jobs = [(job.with_flags(change.flags), _rank(change.layout, *stage)) for change in wanted]
    found = zip(wanted, plan_each(jobs), strict=True)
    return [(change, one.plan) for change, one in found if not isinstance(one, Failure)]


def _rank(layout: Layout, stage: int, stages: int) -> int:
    """Return the first rank of the stage that stands where another did among fewer."""
    is_last = stage == stages - 1 > 0
    place = layout.pipeline - 1 if is_last else stage * layout.pipeline // stages
    return layout.first_of(place)


def _fitting(
    tried: Sequence[tuple[Change, "RankPlan"]], memory: int
) -> list[tuple[Change, "RankPlan"]]:
    return [one for one in tried if one[1].memory.peak <= memory]


def _joined(parts: Sequence[Change]) -> Change:
    """Return several changes of one run as one, in which the later value of a flag stands."""
    values: dict[str, list[str]] = {}
    for part in parts:
        values |= _by_flag(part.flags)
    costs = ", ".join(dict.fromkeys(part.cost for part in parts))
    sizes = {
        name: max(getattr(part.layout, name) for part in parts)
        for name in ("tensor", "pipeline", "context")
    }
    flags = tuple(word for flag, own in values.items() for word in (flag, *own))
    return Change(flags, costs, replace(parts[0].layout, **sizes))


def _by_flag(words: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word
            found[flag] = []
        else:
            found[flag].append(word)
    return found
