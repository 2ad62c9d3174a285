"""A plan as a table of one screen, and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from megalora.plan.facts import Adapters
from megalora.plan.fit import Proposal
from megalora.plan.job import Planned

if TYPE_CHECKING:
    from megalora.plan.floor import Floor
    from megalora.plan.rank import RankPlan
    from megalora.plan.traffic import Traffic

# Of the JSON: raised where a field goes or means something else.
SCHEMA = 1
GIB, GB = 2**30, 10**9
# Of ranks and of collectives; the JSON has all.
_SHOWN_RANKS, _SHOWN_TRAFFIC = 8, 10


@dataclass(frozen=True, slots=True)
class Found:
    """A plan, and what a device makes of it.

    memory: of a GPU, bytes. others: flags with which it would fit, where it does not.
    """

    planned: Planned
    memory: int
    floor: "Floor"
    others: list[Proposal]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits a GPU."""
        return self.planned.fullest.memory.peak <= self.memory

    @property
    def checkpoint(self) -> int:
        """Bytes of the planned stages' adapters in a checkpoint, with the optimizer's states."""
        return sum(plan.memory.stored.checkpoint for plan in self.planned.ranks)

    @property
    def exported(self) -> int:
        """Bytes of the planned stages' adapters in a Hugging Face directory."""
        return sum(plan.memory.stored.exported for plan in self.planned.ranks)


def to_dict(found: Found) -> dict[str, Any]:
    """Return all that is known as JSON-ready values; docs/planning.md has the fields."""
    planned = found.planned
    return {
        "schema": SCHEMA,
        "script": str(planned.job.script),
        "flags": list(planned.job.argv),
        "gpu_memory": found.memory,
        "fits": found.fits,
        "fullest": planned.fullest.rank,
        "run": asdict(planned.facts),
        "ranks": [
            {**asdict(plan), "peak": plan.memory.peak, "alike": asdict(planned.like(plan))}
            for plan in planned.ranks
        ],
        "checkpoint": found.checkpoint,
        "exported": found.exported,
        "floor": asdict(found.floor),
        "would_fit": [asdict(other) for other in found.others],
    }


def table(found: Found) -> list[str]:
    """Return the lines of a plan's table: the run, its fullest rank, what would make it fit."""
    fullest = found.planned.fullest
    return [
        *_run(found),
        "",
        *_memory(found),
        *_fit(found),
        "",
        *_traffic(fullest.traffic),
        *_work(fullest),
        *_floor(found.floor),
        *(f"note: {note}" for note in (*fullest.notes, *found.planned.facts.notes)),
    ]


def _run(found: Found) -> Iterator[str]:
    facts, job = found.planned.facts, found.planned.job
    layout, batch = facts.layout, facts.batch
    nodes = -(-layout.world_size // job.gpus_per_node)
    sequence = " with sequence parallelism" if layout.sequence_parallel else ""
    chunks = f" of {layout.virtual} chunks" if layout.virtual > 1 else ""
    yield (
        f"plan      {job.script.name} on {layout.world_size:,} GPUs ({nodes:,} "
        f"node{'s' * (nodes > 1)} of {min(job.gpus_per_node, layout.world_size)}): tp "
        f"{layout.tensor}{sequence}, pp {layout.pipeline}{chunks}, cp {layout.context}, dp "
        f"{layout.data}, ep {layout.expert}, etp {layout.expert_tensor}"
    )
    yield (
        f"batch     {batch.whole:,} sequences of {batch.sequence_length:,} tokens: "
        f"{batch.microbatches:,} microbatches of {batch.micro} in each of {layout.data:,} replicas"
    )
    if facts.adapters is not None:
        is_given = any(word.partition("=")[0] == "--lr" for word in job.argv)
        given = facts.learning_rate if is_given else None
        yield from _adapters(facts.adapters, given, found)


def _adapters(adapters: Adapters, given: float | None, found: Found) -> Iterator[str]:
    config = adapters.config
    yield (
        f"adapters  rank {config['rank']}, alpha {config['alpha']:g}, "
        f"{' '.join(config['targets'])}: {adapters.parameters:,} parameters; "
        f"{found.checkpoint / GB:.3g} GB in a checkpoint, {found.exported / GB:.3g} GB exported"
    )
    low, high = adapters.learning_rate
    said = f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"
    own = "" if given is None else f"; --lr is {given:.2e}"
    yield f"rate      recommended {said}, constant (family {adapters.family or 'unknown'}){own}"


def _memory(found: Found) -> Iterator[str]:
    planned = found.planned
    plan = planned.fullest
    held, alike = plan.memory, planned.like(plan)
    which = f"the fullest of {len(planned.ranks)}" if len(planned.ranks) > 1 else "planned alone"
    yield f"rank {plan.rank}, {which}, for {alike.count:,} ranks ({alike.rule}), in GiB:"
    kept = held.buffers + held.other
    for name, size, more in (
        ("weights", held.weights, f"{held.frozen:,} frozen, {held.trained:,} trained parameters"),
        ("gradients", held.gradients, ""),
        ("optimizer", held.optimizer_most, ""),
        ("activations", held.activations, "and what else a step needs for a while"),
        ("other", kept, "buffers of the model, small tensors"),
    ):
        yield f"  {name:<12}{_shown(size / GIB):>9}  {more}".rstrip()
    room = (found.memory - held.peak) / GIB
    verdict = f"fits, {room:.1f} free" if found.fits else f"does not fit, {-room:.1f} too much"
    yield f"  {'peak':<12}{_shown(held.peak / GIB):>9}  of {found.memory / GIB:.1f}: {verdict}"
    others = [one for one in planned.ranks if one is not plan]
    if others:
        peaks = [f"{one.rank}: {_shown(one.memory.peak / GIB)}" for one in others[:_SHOWN_RANKS]]
        more = f", and {len(others) - _SHOWN_RANKS} more" if len(others) > _SHOWN_RANKS else ""
        yield f"  peaks of others, by rank  {', '.join(peaks)}{more}"


def _shown(number: float) -> str:
    """Return a number with three digits."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}" if number > 1e-4 else "0.00"


def _fit(found: Found) -> Iterator[str]:
    if found.fits:
        return
    if not found.others:
        yield "would fit: with none of the changes that were planned (docs/planning.md lists them)"
        return
    yield "would fit, cheapest first, with its peak in GiB:"
    for other in found.others:
        yield f"  {_shown(other.peak / GIB):>7}  {' '.join(other.flags)}  ({other.cost})"


_HEADS = ("calls", "GB", "in its node", "to others")


def _traffic(found: "Sequence[Traffic]") -> Iterator[str]:
    """Yield a line for each kind of collective, those that carry most first."""
    yield f"{'sent in a step, GB':<50}" + "".join(f"{head:>12}" for head in _HEADS)
    groups: dict[str, list[Traffic]] = {}
    for one in found:
        name = (
            f"{one.kind} of {one.ranks} on {one.nodes} node{'s' * (one.nodes > 1)}, {one.purpose}"
        )
        groups.setdefault(name, []).append(one)
    rows = sorted(groups.items(), key=lambda row: -sum(one.size for one in row[1]))
    for name, ones in rows[:_SHOWN_TRAFFIC]:
        yield _line(name, ones)
    if len(rows) > _SHOWN_TRAFFIC:
        rest = [one for _, ones in rows[_SHOWN_TRAFFIC:] for one in ones]
        yield _line(f"{len(rows) - _SHOWN_TRAFFIC} others", rest)
    yield _line("all", found)
    yield _line("of them for LoRA alone", [one for one in found if one.is_for_adapters])


def _line(name: str, ones: "Sequence[Traffic]") -> str:
    sums = [sum(getattr(one, field) for one in ones) for field in ("size", "within", "between")]
    sizes = "".join(f"{_shown(size / GB):>12}" for size in sums)
    return f"  {name:<48}{sum(one.calls for one in ones):>12,}{sizes}"


def _work(plan: "RankPlan") -> Iterator[str]:
    work = plan.work
    parts = ("base", "adapters", "attention", "recomputed")
    shown = ", ".join(f"{part} {_shown(getattr(work, part) / 1e12)}" for part in parts)
    yield (
        f"FLOPs     {_shown(work.total / 1e12)} T in a step ({shown}): {work.ratio:.3f} of full "
        f"fine-tuning's {_shown(work.full / 1e12)} T"
    )


def _floor(floor: "Floor") -> Iterator[str]:
    yield (
        f"floor     {floor.seconds:.3g} s a step on {floor.device} over {floor.network}, a bound, "
        f"no prediction ({floor.in_turn:.3g} s where nothing overlaps)"
    )
    yield (
        f"          at most {floor.tokens_per_second:,.0f} tokens/s, "
        f"{floor.tokens_per_second_per_gpu:,.0f} on each GPU, {floor.utilization:.0%} of its peak; "
        f"a pipeline of equal stages idles {floor.bubble:.0%}"
    )
