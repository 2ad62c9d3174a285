"""How Megatron fuses Hugging Face's q, k and v into one linear."""

from torch import Tensor

from megalora.adapters.rows import join_projections, split_projections
from megalora.model.shape import ModelShape
from megalora.targets import qkv_period


def split_qkv(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """Split rows [g * (heads_per_group + 2) * d, ...] of linear_qkv in q, k and v.

    With an output gate, q has each head's rows and then its gate's.
    """
    q, k, v = split_projections(fused, _period(shape))
    return [_by_head(q, shape, to_hf=True), k, v]


def join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: ModelShape) -> Tensor:
    """Interleave rows of q, k and v per query group; the inverse of `split_qkv`."""
    return join_projections([_by_head(q, shape, to_hf=False), k, v], _period(shape))


def _by_head(q: Tensor, shape: ModelShape, *, to_hf: bool) -> Tensor:
    """Turn a group's heads, then their gates, into heads each with its gate; or back."""
    if not shape.attention_output_gate:
        return q
    heads, gates = shape.heads_per_group, 2
    order = (gates, heads) if to_hf else (heads, gates)
    rows = q.unflatten(0, (shape.num_query_groups, *order, shape.kv_channels))
    return rows.transpose(1, 2).flatten(0, 3)


def _period(shape: ModelShape) -> tuple[int, int, int]:
    return qkv_period(
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.kv_channels,
        output_gate=shape.attention_output_gate,
    )
