"""The sharding contract as a table: what travels around each kind of base linear.

t tensor-parallel size, n tokens, i/o in/out features, r rank. Every `lora_A` [r, i] is sharded
along its input and every `lora_B` [o, r] along its output; nothing is replicated. `Split` says how
the base's weight is split, `State` in which state the wide tensor at its unsplit side is; the route
says what a rank does with its shards and how s [n, r] and its gradient travel.
"""

from dataclasses import dataclass
from enum import Enum

from megalora.adapters.bases import Split, State
from megalora.adapters.collectives import Collective


class ShardUse(Enum):
    """What a rank does with its shard of lora_A or lora_B."""

    LOCAL = "used as it is"
    SUMMED = "gathered; its gradient is reduce-scattered"
    SLICED = "gathered; its gradient is computed for the own shard only"


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the sharding contract."""

    a: ShardUse
    b: ShardUse
    forward: Collective
    backward: Collective


# NOTE: two collectives are not hidden: the gather of A where s itself must travel (column, token
# shard), and what is left of the reduce-scatter of dA behind the update of dX.
ROUTES: dict[tuple[Split, State], Route] = {
    (Split.COLUMN, State.TOKEN_SHARD): Route(
        ShardUse.SUMMED, ShardUse.LOCAL, Collective.ALL_GATHER, Collective.REDUCE_SCATTER
    ),
    (Split.COLUMN, State.REPLICATED): Route(
        ShardUse.SLICED, ShardUse.LOCAL, Collective.NONE, Collective.ALL_REDUCE
    ),
    (Split.COLUMN, State.PARTIAL): Route(
        ShardUse.SUMMED, ShardUse.LOCAL, Collective.NONE, Collective.NONE
    ),
    (Split.ROW, State.TOKEN_SHARD): Route(
        ShardUse.LOCAL, ShardUse.SUMMED, Collective.REDUCE_SCATTER, Collective.ALL_GATHER
    ),
    (Split.ROW, State.REPLICATED): Route(
        ShardUse.LOCAL, ShardUse.SLICED, Collective.ALL_REDUCE, Collective.NONE
    ),
    (Split.ROW, State.PARTIAL): Route(
        ShardUse.LOCAL, ShardUse.SUMMED, Collective.NONE, Collective.NONE
    ),
    (Split.DUPLICATED, State.TOKEN_SHARD): Route(
        ShardUse.SUMMED, ShardUse.SUMMED, Collective.NONE, Collective.NONE
    ),
    (Split.DUPLICATED, State.REPLICATED): Route(
        ShardUse.SLICED, ShardUse.SLICED, Collective.NONE, Collective.NONE
    ),
}
LOCAL_ROUTE = Route(ShardUse.LOCAL, ShardUse.LOCAL, Collective.NONE, Collective.NONE)
