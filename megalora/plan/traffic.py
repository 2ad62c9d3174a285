"""What one rank sends in a step: collectives by what they are for, and the links that they cross.

What a collective of N bytes on its larger side makes each of n ranks send, by the algorithms that
NCCL takes for large messages (its tests' PERFORMANCE.md has the same factors):

    all-gather, reduce-scatter   (n - 1) / n N        ring
    all-reduce                   2 (n - 1) / n N      ring, a reduce-scatter and an all-gather
    all-to-all                   (n - 1) / n N        a message to each other rank
    broadcast                    (n - 1) / n N        chain, the mean over the ranks
    send                         N

A ring goes through all ranks of a node before it leaves it. There are as many rings as a node has
ranks of the group, g, and each leaves by another one: of what a rank sends, 1 / g goes to another
node. Of an all-to-all, (n - g) / n N does. In-network reduction (SHARP) would send less.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil

from megalora.plan.meter import Call, Meter
from megalora.plan.phases import MICROBATCH, Step

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, BROADCAST, SEND, RECEIVE = "all-to-all", "broadcast", "send", "receive"
# As c10d calls them.
KINDS = {
    "_allgather_base_": ALL_GATHER,
    "allgather_": ALL_GATHER,
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
    "reduce_scatter_": REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced_": REDUCE_SCATTER,
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "alltoall_base_": ALL_TO_ALL,
    "alltoall_": ALL_TO_ALL,
    "broadcast_": BROADCAST,
    "send": SEND,
    "recv_": RECEIVE,
}

ADAPTERS, GRADIENTS, PARAMETERS, OPTIMIZER = "adapters", "gradients", "parameters", "optimizer"
PIPELINE, EXPERTS, TENSOR, CONTEXT = "pipeline", "experts", "tensor parallelism", "context"
EMBEDDINGS, OTHER = "embeddings", "other"
# With a frozen base, these are there for the adapters alone.
OF_TRAINED = (ADAPTERS, GRADIENTS, PARAMETERS, OPTIMIZER)
# By the start of who asks, and by the start of Megatron's name of the group; the first that fits.
_BY_OWNER = (
    ("megalora.adapters", ADAPTERS),
    ("megatron.core.optimizer", OPTIMIZER),
)
_DATA_PARALLEL = "megatron.core.distributed"
_BY_GROUP = (
    ("EXPERT", EXPERTS),
    ("CONTEXT", CONTEXT),
    ("HIERARCHICAL_CONTEXT", CONTEXT),
    ("EMBEDDING", EMBEDDINGS),
    ("POSITION_EMBEDDING", EMBEDDINGS),
    ("TENSOR", TENSOR),
    ("PIPELINE", PIPELINE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One kind of collective in one step of a rank.

    kind: as `all-gather`. purpose: what it is for, as `adapters`; with a frozen base, gradients,
    parameters and optimizer are the adapters' too. way: of the pass, where `recomputed` is what
    recomputation does again. ranks: how many take part. nodes: on how many nodes they are. calls:
    how often a step has it. size: bytes of its larger side, within and between: bytes that this
    rank sends to ranks of its own node and of others; all three of all calls.
    """

    kind: str
    purpose: str
    way: str
    ranks: int
    nodes: int
    calls: int
    size: int
    within: int
    between: int

    @property
    def is_for_adapters(self) -> bool:
        """Say whether it is there for the adapters alone, where the base is frozen."""
        return self.purpose in OF_TRAINED


def traffic(meter: Meter, step: Step, *, gpus_per_node: int) -> list[Traffic]:
    """Return the collectives of a whole step of a rank, the largest first.

    Of several ranks only; one alone sends nothing.
    """
    sums: dict[tuple[str, str, str, int, int], Counter[str]] = {}
    for call, counted in meter.calls.items():
        if len(call.ranks) == 1:
            continue
        nodes = Counter(rank // gpus_per_node for rank in call.ranks)
        kind = KINDS.get(call.kind, call.kind)
        key = kind, _purpose(call, kind), call.way, len(call.ranks), len(nodes)
        calls, size = (in_a_step(number, call, step) for number in (counted, meter.sent[call]))
        within, between = sends(kind, size, len(call.ranks), nodes=len(nodes))
        one = sums.setdefault(key, Counter())
        one.update(calls=calls, size=size, within=within, between=between)
    found = [
        Traffic(kind=kind, purpose=purpose, way=way, ranks=ranks, nodes=nodes, **counts)
        for (kind, purpose, way, ranks, nodes), counts in sums.items()
    ]
    return sorted(found, key=lambda one: -one.size)


def sends(kind: str, size: int, ranks: int, *, nodes: int) -> tuple[int, int]:
    """Return the bytes that a rank sends within its node and to others.

    size: bytes of the larger side. The ranks are spread evenly over the nodes.
    """
    if kind in (SEND, RECEIVE):
        sent = size if kind == SEND else 0
        return (sent, 0) if nodes == 1 else (0, sent)
    sent = ceil(size * (ranks - 1) / ranks) * (2 if kind == ALL_REDUCE else 1)
    if nodes == 1:
        return sent, 0
    own = ranks / nodes
    share = (ranks - own) / (ranks - 1) if kind == ALL_TO_ALL else 1 / own
    between = round(sent * min(1.0, share))
    return sent - between, between


def in_a_step(counted: int, call: Call, step: Step) -> int:
    """Return what a whole step has of a collective that the metered microbatches had so often.

    All that a microbatch asks for grows with them, but for the sums of gradients, which its last
    microbatch starts where they overlap, and for parameters, which its first one gathers.
    """
    if call.phase != MICROBATCH or call.owner.startswith(_DATA_PARALLEL):
        return counted
    each, rest = divmod(counted, step.microbatches)
    assert not rest, f"{call}: {counted} in {step.microbatches} microbatches"
    return each * step.all_microbatches


def _purpose(call: Call, kind: str) -> str:
    for start, purpose in _BY_OWNER:
        if call.owner.startswith(start):
            return purpose
    for start, purpose in _BY_GROUP:
        if call.group.startswith(start) and not call.owner.startswith(_DATA_PARALLEL):
            return purpose
    if call.owner.startswith(_DATA_PARALLEL):
        if "EMBEDDING" in call.group:
            return EMBEDDINGS
        return PARAMETERS if kind == ALL_GATHER else GRADIENTS
    return OTHER
