"""The factors of an adapter: declared once by its kind, and how each lies over the ranks.

Every factor is sharded along the one of its dimensions that counts the base's features, so no
parameter is replicated over tensor-parallel ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.collectives import group_size, own_shard, start_gather
from megalora.adapters.rows import (
    fit_padding,
    from_stored,
    stored_by_tensor,
    to_ranks,
    to_stored,
    to_whole,
)
from megalora.model.facts import (
    DELTA_GATES,
    MAMBA_WIDE,
    ModelFacts,
    delta_parts,
    mamba_parts,
)
from megalora.targets import ADAPTER_SUFFIX, DELTA_NET, MAMBA, AdapterSpec, Rows, is_gated


class Axis(Enum):
    """What a dimension of a factor counts."""

    RANK = "rank of one projection, r"
    RANKS = "ranks of all projections, P r"
    INPUT = "input features, i"
    OUTPUT = "output features, o"


@dataclass(frozen=True, slots=True)
class Factor:
    """One tensor of a kind of adapter.

    name: of the parameter, and the last part of its keys.
    axes: dimensions of the whole tensor of one expert; one of them is the input or the output.
    start: first value of every element, or a function of (name, shape, seed) that draws the whole
        tensor; the name is the adapter's, with the number of the expert behind it.
    """

    name: str
    axes: tuple[Axis, ...]
    start: float | Callable[[str, tuple[int, ...], int], Tensor]

    @property
    def dim(self) -> int:
        """The dimension that is sharded, counted from the end."""
        wide = next(n for n, axis in enumerate(self.axes) if axis in (Axis.INPUT, Axis.OUTPUT))
        return wide - len(self.axes)

    @property
    def is_output(self) -> bool:
        """Whether it is sharded along the base's output features, whose rows have an order."""
        return self.axes[self.dim] is Axis.OUTPUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How one factor of one adapter lies over the ranks.

    shape: whole, of one expert. rows: of the sharded dimension. group: the ranks that share it.
    num_experts: local experts, which come first; 0 where there is one factor for all.
    """

    factor: Factor
    shape: tuple[int, ...]
    rows: Rows
    group: ProcessGroup | None
    num_experts: int
    expert_group: ProcessGroup | None

    def whole_shape(self) -> tuple[int, ...]:
        """Return the shape over all ranks, [(E,) ...]."""
        experts = self.num_experts * group_size(self.expert_group)
        return (experts, *self.shape) if experts else self.shape

    def own_shape(self) -> tuple[int, ...]:
        """Return the shape of this rank's shard; ValueError where it cannot be cut."""
        size, shape = group_size(self.group), list(self.shape)
        for block in self.rows.blocks:
            if block % size:
                raise ValueError(
                    f"{block} features to shard, which is not divisible by its tensor-parallel "
                    f"size {size}"
                )
        shape[self.factor.dim] //= size
        return (self.num_experts, *shape) if self.num_experts else tuple(shape)

    def gather(self, own: Tensor) -> Tensor:
        """Return the whole tensor of what each rank holds; all ranks must call it."""
        dim = self.factor.dim
        ranks = start_gather(own, dim, self.group).wait()
        whole = to_whole(ranks, self.rows, group_size(self.group), dim)
        if not self.num_experts:
            return whole
        return start_gather(whole, -whole.dim(), self.expert_group).wait()

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the tensor of what each rank of `group` holds, of this rank's experts."""
        dim = self.factor.dim
        ranks = torch.cat(list(shards), dim) if len(shards) > 1 else shards[0]
        return to_whole(ranks, self.rows, len(shards), dim)

    def shard(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of the whole tensor; the inverse of `gather`."""
        if self.num_experts:
            whole = own_shard(whole, -whole.dim(), self.expert_group)
        return self.shard_features(whole)

    def shard_features(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of a tensor that has its local experts alone."""
        dim = self.factor.dim
        ranks = to_ranks(whole, self.rows, group_size(self.group), dim)
        return own_shard(ranks, dim, self.group)

    def fit(self, whole: Tensor, key: str) -> Tensor:
        """Return a whole tensor from elsewhere with this vocabulary's padding.

        Raises ValueError, which names its key, where it has another shape.
        """
        if whole.dim() == len(self.whole_shape()):
            whole = fit_padding(whole, self.rows, self.factor.dim)
        if whole.shape != self.whole_shape():
            raise ValueError(
                f"{key} has shape {list(whole.shape)}, but this model needs "
                f"{list(self.whole_shape())}"
            )
        return whole

    def stored(
        self, key: str, own: Tensor, replica: ReplicaId
    ) -> ShardedTensor | ShardedTensorFactory:
        """Describe this rank's shard to Megatron's checkpointing.

        Megatron stores the optimizer's states in the same way.
        """
        if len(self.rows.blocks) == 1:
            return self._sharded_tensor(key, own, replica)

        @torch.no_grad()
        def build(
            key: str, own: Tensor, replica: ReplicaId, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            assert flattened_range is None, "states are saved as fully reshardable"
            stored = to_stored(own, self.rows, group_size(self.group), self.factor.dim)
            return [self._sharded_tensor(key + end, t, replica) for end, t in stored.items()]

        def merge(stored: list[Tensor]) -> Tensor:
            return from_stored(stored, self.factor.dim, has_blocks=not self.rows.names)

        return ShardedTensorFactory(key, own, build, merge, replica)  # type: ignore[arg-type]

    def _sharded_tensor(self, key: str, stored: Tensor, replica: ReplicaId) -> ShardedTensor:
        cuts = [(stored.dim() + self.factor.dim, self.group)]
        if self.num_experts:
            cuts.insert(0, (0, self.expert_group))
        return ShardedTensor.from_rank_offsets(
            key,
            stored,
            *((dim, group.rank(), group.size()) for dim, group in cuts if group is not None),
            replica_id=replica,
            # Megatron pads the vocabulary to a multiple of the tensor-parallel size.
            allow_shape_mismatch=self.rows.padded,
        )


def sizes(spec: AdapterSpec, in_features: int) -> dict[Axis, int]:
    """Return what the axes of an adapter's factors count, over all ranks."""
    return {
        Axis.RANK: spec.rank,
        Axis.RANKS: spec.num_projections * spec.rank,
        Axis.INPUT: in_features,
        Axis.OUTPUT: spec.rows.size,
    }


def from_checkpoint(
    stored: Mapping[str, Tensor], factors: Sequence[Factor], facts: ModelFacts
) -> dict[str, Tensor]:
    """Return the whole tensors of stored ones, by global name, without a model.

    Raises ValueError where one is no factor of these.
    """
    whole = {}
    for key, tensors in stored_by_tensor(stored).items():
        name, factor = _factor_of(key, factors)
        has_blocks = factor.is_output and is_gated(name, facts)
        whole[key] = from_stored(tensors, factor.dim, has_blocks=has_blocks)
    return whole


def to_checkpoint(
    whole: Mapping[str, Tensor], factors: Sequence[Factor], facts: ModelFacts
) -> dict[str, Tensor]:
    """Return what a checkpoint stores of whole tensors; the inverse of `from_checkpoint`."""
    stored = {}
    for key, tensor in whole.items():
        name, factor = _factor_of(key, factors)
        size = tensor.shape[factor.dim]
        rows = _output_rows(name, size, facts) if factor.is_output else Rows(blocks=(size,))
        parts = to_stored(tensor, rows, 1, factor.dim)
        stored |= {key + end: part.contiguous() for end, part in parts.items()}
    return stored


def _output_rows(name: str, size: int, facts: ModelFacts) -> Rows:
    """Return the order of so many rows of a base's output."""
    if is_gated(name, facts):
        return Rows(blocks=(size // 2, size // 2))
    if name.endswith(DELTA_NET[0]):
        parts = delta_parts(facts)
        wide = {part: rows for part, rows in parts.items() if part not in DELTA_GATES}
    elif name.endswith(MAMBA[0]):
        parts = mamba_parts(facts)
        wide = {part: parts[part] for part in MAMBA_WIDE}
    else:
        return Rows(blocks=(size,))
    parts = parts if size == sum(parts.values()) else wide
    return Rows(blocks=tuple(parts.values()), names=tuple(parts))


def _factor_of(key: str, factors: Sequence[Factor]) -> tuple[str, Factor]:
    """Return the name of the base and the factor that a whole tensor's key is of."""
    adapter, _, name = key.rpartition(".")
    for factor in factors:
        if factor.name == name:
            return adapter.removesuffix(ADAPTER_SUFFIX), factor
    raise ValueError(
        f"{key} is no factor of this kind of adapter, which has {[f.name for f in factors]}"
    )
