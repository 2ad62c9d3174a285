"""What adapters send by the sharding contract (`adapters.routes`), linear by linear.

The plan's own count of collectives (`plan.traffic`) must come to the same: tests compare them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.bases import Style, state
from megalora.adapters.collectives import Collective, group_size
from megalora.adapters.routes import Route, ShardUse
from megalora.plan.meter import BACKWARD, FORWARD
from megalora.plan.traffic import ALL_GATHER, REDUCE_SCATTER

_OUTPUT = "output_layer"


class Travel(NamedTuple):
    """One collective of one call of an adapter. size: bytes of its larger side."""

    what: str
    kind: str
    way: str
    ranks: int
    size: int


class Sizes(NamedTuple):
    """Bytes of a whole A, a whole B and s of all tokens, and over how many ranks each is cut."""

    a: int
    b: int
    s: int
    a_ranks: int
    b_ranks: int
    s_ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTraffic:
    """What the adapters of linears of one name send for each microbatch, on one rank.

    linear: as `linear_qkv`. what: that travels, A, B, s or their gradients. kind: as `all-gather`.
    way: of the pass; full recomputation has what goes forward twice. ranks: how many take part.
    calls: of all such linears. size: bytes of the larger side, of all calls.
    """

    linear: str
    what: str
    kind: str
    way: str
    ranks: int
    calls: int
    size: int


def contract(
    model: Sequence[torch.nn.Module], *, tokens: int, predictions: int = 1
) -> list[LinearTraffic]:
    """Return what a rank's adapters send for each microbatch by the routes of their linears.

    tokens: of a microbatch, in all of a tensor-parallel group. predictions: how often the output
    layer is called, once for each token that is predicted ahead.
    """
    calls: Counter[tuple[str, Travel]] = Counter()
    for name, adapter in named_adapters(model):
        linear = name.removesuffix("_lora").rpartition(".")[2]
        for travel in _travels(adapter, tokens):
            calls[linear, travel] += predictions if linear == _OUTPUT else 1
    return [
        LinearTraffic(
            linear=linear,
            what=one.what,
            kind=one.kind,
            way=one.way,
            ranks=one.ranks,
            calls=number,
            size=number * one.size,
        )
        for (linear, one), number in calls.items()
    ]


def travels(route: Route, sizes: Sizes, *, kept: bool = False) -> Iterator[Travel]:
    """Yield what one call sends, forward and backward, of a linear on a route.

    Forward: what is not used as the shard it is is gathered, and s goes its way. Backward: A is
    gathered again, unless it was kept; the gradient of s goes its way; gradients of factors that
    every rank has a part of are summed into shards. One rank alone sends nothing.
    """
    a, b, s, a_ranks, b_ranks, s_ranks = sizes
    gathers_a, gathers_b = (use is not ShardUse.LOCAL for use in (route.a, route.b))
    wanted = (
        (gathers_a, Travel("A", ALL_GATHER, FORWARD, a_ranks, a)),
        (gathers_b, Travel("B", ALL_GATHER, FORWARD, b_ranks, b)),
        (_moves(route.forward), Travel("s", route.forward.value, FORWARD, s_ranks, s)),
        (gathers_a and not kept, Travel("A", ALL_GATHER, BACKWARD, a_ranks, a)),
        (_moves(route.backward), Travel("ds", route.backward.value, BACKWARD, s_ranks, s)),
        (route.a is ShardUse.SUMMED, Travel("dA", REDUCE_SCATTER, BACKWARD, a_ranks, a)),
        (route.b is ShardUse.SUMMED, Travel("dB", REDUCE_SCATTER, BACKWARD, b_ranks, b)),
    )
    return (one for asked, one in wanted if asked and one.ranks > 1)


def _moves(collective: Collective) -> bool:
    return collective is not Collective.NONE


def _travels(adapter: LoRAAdapter, tokens: int) -> Iterator[Travel]:
    a, b = adapter.pair()
    a_ranks, b_ranks = group_size(adapter.a_group), group_size(adapter.b_group)
    sizes = Sizes(
        a=a.nbytes * a_ranks,
        b=b.nbytes * b_ranks,
        s=tokens * a.shape[-2] * a.itemsize,
        a_ranks=a_ranks,
        b_ranks=b_ranks,
        s_ranks=adapter.base.tp_size,
    )
    # Experts that are called one by one share what was gathered for all of them.
    kept = adapter.base.style is Style.SEQUENTIAL
    return travels(adapter.route(state(adapter.base)), sizes, kept=kept)
