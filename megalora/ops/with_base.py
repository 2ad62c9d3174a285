"""The ops that have the product with a base weight in them, in plain torch (`ops.reference`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalora.ops.blocks import accumulated, product, spans
from megalora.ops.gate import activation, activation_backward
from megalora.ops.products import (
    expand_,
    expand_dgrad,
    expand_wgrad_,
    shrink_dgrad_,
    shrink_wgrad_,
)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return y = x Wᵀ + s Bᵀ, [..., out], and s = scale * x Aᵀ, [..., P*r]."""
    y, s = _linear(x, weight, lora_A, lora_B, scale, segments)
    return y.to(x.dtype), s


def linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx = dy W + ds A, [..., in], dA = dsᵀ x and dB = dyᵀ s, where ds = scale * dy B."""
    d_a, d_b = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    dx = linear_backward_(d_a, d_b, dy, x, s, weight, lora_A, lora_B, scale, segments)
    return dx, d_a, d_b


def linear_backward_(
    d_a: Tensor,
    d_b: Tensor,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return dx and add dA and dB to d_a and d_b in place."""
    ds = expand_dgrad(dy, lora_B, scale, segments=segments)
    dx = product(dy, accumulated(weight))
    shrink_dgrad_(dx, ds, lora_A)
    shrink_wgrad_(d_a, ds, x)
    expand_wgrad_(d_b, dy, s, 1.0, segments=segments)
    return dx.to(dy.dtype)


def experts_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return y and s of each expert's `linear`, s with zeros behind it up to a multiple of 8."""
    ranks = lora_A.shape[-2]
    y = x.new_zeros(len(x), weights[0].shape[0])
    s = x.new_zeros(len(x), -(-ranks // 8) * 8)
    for e, span in spans(offsets, x):
        assert isinstance(e, int)
        y[span], s[span, :ranks] = linear(
            x[span], weights[e], lora_A[e], lora_B[e], scale, segments
        )
    return y, s


def experts_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dA and dB of each expert's `linear_backward`."""
    d_a, d_b = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    how = (weights, lora_A, lora_B, scale, offsets, segments)
    return experts_linear_backward_(d_a, d_b, dy, x, s, *how), d_a, d_b


def experts_linear_backward_(
    d_a: Tensor,
    d_b: Tensor,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return dx and add dA and dB of each expert to d_a and d_b."""
    ranks = lora_A.shape[-2]
    dx = torch.zeros_like(x)
    for e, span in spans(offsets, x):
        assert isinstance(e, int)
        own = (dy[span], x[span], s[span, :ranks], weights[e], lora_A[e], lora_B[e])
        dx[span] = linear_backward_(d_a[e], d_b[e], *own, scale, segments)
    return dx


def experts_linear_is_fused(weight: Tensor, experts: int, ranks: int) -> bool:
    """Say that nothing is computed in one launch here."""
    return False


def gated_mlp(
    x: Tensor,
    weight1: Tensor,
    lora_A1: Tensor,
    lora_B1: Tensor,
    scale1: float,
    weight2: Tensor,
    lora_A2: Tensor,
    lora_B2: Tensor,
    scale2: float,
    segments: Sequence[int] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z, [..., out], y, [..., 2 f], and s of both `linear`, a = silu(gate) up between.

    y is [gate, up] here, in the precision of sums.
    """
    y, s1 = _linear(x, weight1, lora_A1, lora_B1, scale1, segments)
    gate, up = y.chunk(2, dim=-1)
    a = activation(gate, up, weights).to(x.dtype)
    z, s2 = linear(a, weight2, lora_A2, lora_B2, scale2)
    return z, y, s1, s2


def gated_mlp_backward(
    dz: Tensor,
    x: Tensor,
    y: Tensor,
    s1: Tensor,
    s2: Tensor,
    weight1: Tensor,
    lora_A1: Tensor,
    lora_B1: Tensor,
    scale1: float,
    weight2: Tensor,
    lora_A2: Tensor,
    lora_B2: Tensor,
    scale2: float,
    segments: Sequence[int] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, the gradients of all factors, and d_weights."""
    d_a1, d_b1 = torch.zeros_like(lora_A1), torch.zeros_like(lora_B1)
    d_a2, d_b2 = torch.zeros_like(lora_A2), torch.zeros_like(lora_B2)
    sums, made = (d_a1, d_b1, d_a2, d_b2), (dz, x, y, s1, s2)
    first, second = (weight1, lora_A1, lora_B1, scale1), (weight2, lora_A2, lora_B2, scale2)
    dx, d_weights = gated_mlp_backward_(*sums, *made, *first, *second, segments, weights)
    return dx, *sums, d_weights


def gated_mlp_backward_(
    d_a1: Tensor,
    d_b1: Tensor,
    d_a2: Tensor,
    d_b2: Tensor,
    dz: Tensor,
    x: Tensor,
    y: Tensor,
    s1: Tensor,
    s2: Tensor,
    weight1: Tensor,
    lora_A1: Tensor,
    lora_B1: Tensor,
    scale1: float,
    weight2: Tensor,
    lora_A2: Tensor,
    lora_B2: Tensor,
    scale2: float,
    segments: Sequence[int] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dx and d_weights, and add the gradients of all factors in place."""
    gate, up = y.chunk(2, dim=-1)
    a = activation(gate, up, weights).to(x.dtype)
    da = linear_backward_(d_a2, d_b2, dz, a, s2, weight2, lora_A2, lora_B2, scale2)
    dy, d_weights = activation_backward(accumulated(da), gate, up, weights)
    dy = dy.to(x.dtype)
    dx = linear_backward_(d_a1, d_b1, dy, x, s1, weight1, lora_A1, lora_B1, scale1, segments)
    return dx, dz.new_empty(0) if weights is None else d_weights


def gated_mlp_is_fused(weight2: Tensor, rank1: int, rank2: int) -> bool:
    """Say that there is no pass of its own here."""
    return False


def _linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return `linear` with y in the precision of its sums."""
    s = (scale * product(x, accumulated(lora_A).mT)).to(x.dtype)
    y = product(x, accumulated(weight).mT)
    expand_(y, s, lora_B, 1.0, segments=segments)
    return y, s
