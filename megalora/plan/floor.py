"""How fast a step can be at best: a roofline of products, memory and links, no prediction.

A product takes at least its FLOPs at the GPU's peak, and at least the time to read its operands
and to write its result once. Attention is a fused kernel's, of the scores that a mask leaves; where
a plan has all scores as products, half of their FLOPs are counted and no memory. What is not a
product or a message is left out: norms, activations, permutations, launches; so are stragglers, and
a kernel is never as fast as the peak. A real step takes longer. (Williams, Waterman and Patterson,
"Roofline", 2009.)

A pipeline of p equal stages, each in v chunks, idles for (p - 1) / (v m) of the time that m
microbatches take, in 1F1B and its interleaved form (Narayanan et al., 2021, "Efficient Large-Scale
Language Model Training on GPU Clusters", section 2.2). Where one stage takes longer than the
others, their turns may hide behind its own: the floor then counts only what cannot,
(p - 1) (2 least - most) / v of one microbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalora.plan.devices import Device, Network
from megalora.plan.meter import AGAIN
from megalora.plan.work import ATTENTION, Products, Work

if TYPE_CHECKING:
    from megalora.plan.rank import RankPlan

# What a causal kernel computes of all scores, which are torch's batched products in a plan.
_CAUSAL, _SCORES = 0.5, "aten."


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFloor:
    """What the step of one rank takes at least on each of its resources, in seconds.

    compute: products. update: gradients cleared and read, the optimizer's states read and written.
    within, between: what it sends to ranks of its own node and of others.
    """

    rank: int
    compute: float
    update: float
    within: float
    between: float

    @property
    def overlapped(self) -> float:
        """Seconds where messages hide behind products wherever they can."""
        return max(self.compute + self.update, self.within, self.between)

    @property
    def in_turn(self) -> float:
        """Seconds where nothing hides behind anything."""
        return self.compute + self.update + self.within + self.between


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least time of a step of the whole run, by a roofline; seconds and tokens per second.

    seconds: with all messages hidden behind products, a bound that no run beats. in_turn: the same
    with none hidden, what a run without overlap cannot beat. bubble: of the time of its
    microbatches, what a pipeline of equal stages idles. slowest: the rank that decides.
    tokens_per_second, tokens_per_second_per_gpu, utilization (FLOPs of the busiest rank without
    recomputation, over the peak: a bound of MFU): of `seconds`. ranks: those that were planned.
    """

    device: str
    network: str
    seconds: float
    in_turn: float
    bubble: float
    slowest: int
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    utilization: float
    ranks: list[RankFloor]


def floor(
    plans: "Sequence[RankPlan]",
    device: Device,
    network: Network,
    *,
    tokens: int,
    num_gpus: int,
    stages: int,
    virtual: int = 1,
) -> Floor:
    """Return the floor of a run of which each kind of rank was planned.

    tokens: of a step of the whole run. num_gpus: of the whole run. stages: of the pipeline, each in
    `virtual` chunks.
    """
    microbatches = plans[0].step.all_microbatches
    found = [rank_floor(plan, device, network) for plan in plans]
    bubble = (stages - 1) / (virtual * microbatches)
    times = [one.compute / microbatches for one in found]
    fill = (stages - 1) / virtual * max(0.0, 2 * min(times) - max(times))
    slowest = max(found, key=lambda one: one.overlapped)
    busiest = max(one.compute + one.update for one in found)
    seconds = max(slowest.overlapped, busiest + fill)
    last = max(found, key=lambda one: one.in_turn)
    return Floor(
        device=device.name,
        network=network.name,
        seconds=seconds,
        in_turn=last.in_turn + fill,
        bubble=bubble,
        slowest=slowest.rank,
        tokens_per_second=tokens / seconds,
        tokens_per_second_per_gpu=tokens / seconds / num_gpus,
        utilization=max(_useful(plan.work) for plan in plans) / (seconds * device.flops),
        ranks=found,
    )


def rank_floor(plan: "RankPlan", device: Device, network: Network) -> RankFloor:
    """Return what the step of one rank takes at least on each of its resources."""
    compute = sum(_seconds(one, device) for one in plan.work.products)
    update = 2 * (plan.memory.gradients + plan.memory.optimizer)
    return RankFloor(
        rank=plan.rank,
        compute=compute,
        update=update / device.memory_bandwidth,
        within=sum(one.within for one in plan.traffic) / device.link_bandwidth,
        between=sum(one.between for one in plan.traffic) / network.bandwidth,
    )


def _seconds(one: Products, device: Device) -> float:
    if _is_of_scores(one):
        return one.flops * _CAUSAL / device.flops
    return max(one.flops / device.flops, one.moved / device.memory_bandwidth)


def _is_of_scores(one: Products) -> bool:
    return one.part == ATTENTION and one.op.startswith(_SCORES)


def _useful(work: Work) -> float:
    """Return the FLOPs of a step that no recomputation does, and no mask leaves out."""
    products = (one for one in work.products if _is_of_scores(one) and one.way != AGAIN)
    return work.model - (1 - _CAUSAL) * sum(one.flops for one in products)
