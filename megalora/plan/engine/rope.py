"""Fused rotary embeddings as shapes: they keep the angles alone."""

import torch
from torch import Tensor

from megalora.plan.engine.base import Kept


class _Rope(torch.autograd.Function):
    """A new tensor as large as t."""

    @staticmethod
    def forward(ctx: Kept, t: Tensor, freqs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(freqs)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Kept, d_out: Tensor):  # type: ignore[override]
        return torch.empty_like(d_out, memory_format=torch.contiguous_format), None


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, *_: object, **__: object) -> Tensor:
    """Rotate t, in whichever layout it is."""
    return _Rope.apply(t, freqs)  # type: ignore[return-value]


class _FusedQkvRope(torch.autograd.Function):
    """Queries, keys and values of one product apart, the first two rotated."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, qkv: Tensor, q_freqs: Tensor, k_freqs: Tensor, sizes: list[int]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(q_freqs, k_freqs)
        ctx.shape = qkv.shape
        width = sizes[1]
        heads = (qkv.shape[2] * size // width for size in sizes)
        return tuple(qkv.new_empty(*qkv.shape[:2], number, width) for number in heads)

    @staticmethod
    def backward(ctx: Kept, d_q: Tensor, d_k: Tensor, d_v: Tensor):  # type: ignore[override]
        return d_q.new_empty(ctx.shape), None, None, None


def apply_fused_qkv_rotary_pos_emb(
    qkv: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    qkv_split_arg_list: list[int],
    *_: object,
    **__: object,
) -> tuple[Tensor, ...]:
    """Split qkv [s, b, groups, (heads + 2) d] and rotate queries and keys."""
    return _FusedQkvRope.apply(qkv, q_freqs, k_freqs, qkv_split_arg_list)  # type: ignore[return-value]


class _InPlace(torch.autograd.Function):
    """The queries of latent attention, rotated where they are."""

    @staticmethod
    def forward(ctx: Kept, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(t)
        return t

    @staticmethod
    def backward(ctx: Kept, d_out: Tensor):  # type: ignore[override]
        return d_out, None, None


def in_place(t: Tensor, cos: Tensor, sin: Tensor, *_: object, **__: object) -> Tensor:
    """Rotate the last columns of t."""
    return _InPlace.apply(t, cos, sin)  # type: ignore[return-value]


class _KeysAndValues(torch.autograd.Function):
    """Keys with the rotated part that all heads share, and values, of one product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, kv: Tensor, shared: Tensor, cos: Tensor, sin: Tensor, widths: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.shapes = kv.shape, shared.shape
        return tuple(kv.new_empty(*kv.shape[:-1], width) for width in widths)

    @staticmethod
    def backward(ctx: Kept, d_k: Tensor, d_v: Tensor):  # type: ignore[override]
        kv, shared = ctx.shapes
        return d_k.new_empty(kv), d_k.new_empty(shared), None, None, None


def keys_and_values(
    kv: Tensor,
    k_pos_emb: Tensor,
    cos: Tensor,
    sin: Tensor,
    emb_dim: int,
    k_dim: int,
    v_dim: int,
    *_: object,
    **__: object,
) -> tuple[Tensor, ...]:
    """Return keys [.., heads, k_dim + emb_dim] and values [.., heads, v_dim]."""
    widths = k_dim + emb_dim, v_dim
    return _KeysAndValues.apply(kv, k_pos_emb, cos, sin, widths)  # type: ignore[return-value]
