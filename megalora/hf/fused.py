"""How Megatron fuses Hugging Face projections into one linear, row by row."""

import torch
from torch import Tensor

from megalora.model.shape import ModelShape


def split_qkv(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """Split rows [g * (heads_per_group + 2) * d, ...] of linear_qkv in q, k and v.

    Megatron interleaves: every query group's query heads are followed by its key and value head.
    """
    d, trailing = shape.kv_channels, fused.shape[1:]
    groups = fused.reshape(-1, shape.heads_per_group + 2, d, *trailing)
    q, k, v = groups.split([shape.heads_per_group, 1, 1], dim=1)
    return [part.reshape(-1, *trailing) for part in (q, k, v)]


def join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    """Interleave rows of q, k and v per query group; the inverse of `split_qkv`."""
    d, trailing = shape.kv_channels, q.shape[1:]
    parts = [
        q.reshape(-1, shape.heads_per_group, d, *trailing),
        k.reshape(-1, 1, d, *trailing),
        v.reshape(-1, 1, d, *trailing),
    ]
    return torch.cat(parts, dim=1).reshape(-1, *trailing)
