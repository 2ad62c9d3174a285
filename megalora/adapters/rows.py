"""Rows of Mamba's in_proj: parts of unequal sizes, each split over tensor-parallel ranks by itself.

Rank k holds [z_k; x_k; B_k; C_k; dt_k], which is no slice of the whole [z; x; B; C; dt]. Whole
tensors (`gather_adapters`, the checkpoint's reader) are in the order of the whole; a checkpoint
stores each part as a tensor of its own, as Megatron stores the base weight's, so that it loads on
any number of ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.collectives import group_size

# Megatron's names of the parts, in their order.
PARTS = ("z", "x", "B", "C", "dt")


def is_mamba_mixer(module: torch.nn.Module) -> bool:
    """Say whether a module is Megatron's MambaMixer, without importing it and its kernels."""
    return any(kind.__name__ == "MambaMixer" for kind in type(module).__mro__)


def part_sizes(mixer: Any) -> tuple[int, ...]:
    """Return the global number of rows of each part of a MambaMixer's in_proj."""
    groups = mixer.ngroups * mixer.d_state
    return (mixer.d_inner, mixer.d_inner, groups, groups, mixer.nheads)


def in_whole_order(rows: Tensor, sizes: tuple[int, ...], tp_size: int) -> Tensor:
    """Turn all ranks' rows [t * o/t, ...], one rank after the other, into those of the whole."""
    ranks = rows.unflatten(0, (tp_size, -1))
    blocks = ranks.split([size // tp_size for size in sizes], 1)
    return torch.cat([block.flatten(0, 1) for block in blocks])


def in_rank_order(rows: Tensor, sizes: tuple[int, ...], tp_size: int) -> Tensor:
    """Turn the rows of the whole [o, ...] into all ranks', so that shards of it are theirs."""
    blocks = [part.unflatten(0, (tp_size, -1)) for part in rows.split(sizes)]
    return torch.cat(blocks, 1).flatten(0, 1)


def sharded_parts(
    key: str, rows: Tensor, sizes: tuple[int, ...], group: ProcessGroup | None, replica: ReplicaId
) -> ShardedTensorFactory:
    """Describe a rank's rows [o/t, r] to Megatron's checkpointing as one tensor for each part.

    Megatron builds the optimizer's states by the same factory.
    """
    tp_size = group_size(group)
    offsets = [] if group is None else [(0, group.rank(), tp_size)]

    @torch.no_grad()
    def build(
        key: str, rows: Tensor, replica_id: ReplicaId, flattened_range: slice | None
    ) -> list[ShardedTensor]:
        assert flattened_range is None, "states are saved as fully reshardable"
        blocks = rows.split([size // tp_size for size in sizes])
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{name}", block, *offsets, replica_id=replica_id)
            for name, block in zip(PARTS, blocks, strict=True)
        ]

    return ShardedTensorFactory(key, rows, build, torch.cat, replica)  # type: ignore[arg-type]


def whole_key(key: str) -> str:
    """Return the key of the tensor that a stored key is of, or is a part of."""
    tensor, _, part = key.rpartition(".")
    return tensor if part in PARTS else key


def join_parts(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the parts of stored tensors together; the others pass."""
    joined = {}
    for key in sorted({whole_key(key) for key in stored}):
        found = [stored[name] for part in PARTS if (name := f"{key}.{part}") in stored]
        joined[key] = torch.cat(found) if found else stored[key]
    return joined
