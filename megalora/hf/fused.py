"""How Megatron fuses Hugging Face's q, k and v into one linear."""

from torch import Tensor

from megalora.adapters.rows import join_projections, split_projections
from megalora.model.shape import ModelShape
from megalora.targets import qkv_period


def split_qkv(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """Split rows [g * (heads_per_group + 2) * d, ...] of linear_qkv in q, k and v."""
    return split_projections(fused, _period(shape))


def join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    """Interleave rows of q, k and v per query group; the inverse of `split_qkv`."""
    return join_projections([q, k, v], _period(shape))


def _period(shape: ModelShape) -> tuple[int, int, int]:
    return qkv_period(shape.num_attention_heads, shape.num_query_groups, shape.kv_channels)
