"""The sharding contract as a table: what travels around each kind of base linear.

t tensor-parallel size, n tokens, i/o in/out features, r rank. Every `lora_A` [r, i] is sharded
along its input and every `lora_B` [o, r] along its output; nothing is replicated. `Split` says how
the base's weight is split, `State` in which state the wide tensor at its unsplit side is; the route
says what a rank does with its shards and how s [n, r] and its gradient travel.
"""

from dataclasses import dataclass
from enum import Enum

from megalora.bases import Split, State
from megalora.collectives import Exchange


class Factor(Enum):
    """What a rank does with its shard of lora_A or lora_B."""

    LOCAL = "used as it is"
    SUMMED = "gathered; its gradient is reduce-scattered"
    SLICED = "gathered; its gradient is computed for the own shard only"


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the sharding contract."""

    a: Factor
    b: Factor
    forward: Exchange
    backward: Exchange


# NOTE: two collectives are not hidden: the gather of A where s itself must travel (column, token
# shard), and what is left of the reduce-scatter of dA behind the update of dX.
ROUTES: dict[tuple[Split, State], Route] = {
    (Split.COLUMN, State.TOKEN_SHARD): Route(
        Factor.SUMMED, Factor.LOCAL, Exchange.ALL_GATHER, Exchange.REDUCE_SCATTER
    ),
    (Split.COLUMN, State.REPLICATED): Route(
        Factor.SLICED, Factor.LOCAL, Exchange.NONE, Exchange.ALL_REDUCE
    ),
    (Split.COLUMN, State.PARTIAL): Route(Factor.SUMMED, Factor.LOCAL, Exchange.NONE, Exchange.NONE),
    (Split.ROW, State.TOKEN_SHARD): Route(
        Factor.LOCAL, Factor.SUMMED, Exchange.REDUCE_SCATTER, Exchange.ALL_GATHER
    ),
    (Split.ROW, State.REPLICATED): Route(
        Factor.LOCAL, Factor.SLICED, Exchange.ALL_REDUCE, Exchange.NONE
    ),
    (Split.ROW, State.PARTIAL): Route(Factor.LOCAL, Factor.SUMMED, Exchange.NONE, Exchange.NONE),
    (Split.DUPLICATED, State.TOKEN_SHARD): Route(
        Factor.SUMMED, Factor.SUMMED, Exchange.NONE, Exchange.NONE
    ),
    (Split.DUPLICATED, State.REPLICATED): Route(
        Factor.SLICED, Factor.SLICED, Exchange.NONE, Exchange.NONE
    ),
}
LOCAL_ROUTE = Route(Factor.LOCAL, Factor.LOCAL, Exchange.NONE, Exchange.NONE)
