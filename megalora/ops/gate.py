"""The pass between the linears of a gated MLP, in plain torch (`ops.reference`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalora.ops.blocks import accumulated
from megalora.ops.products import expand_, expand_dgrad, shrink, shrink_dgrad_


def gate_(
    y: Tensor,
    s1: Tensor,
    lora_B1: Tensor,
    scale: float,
    lora_A2: Tensor,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a = silu(gate) up, [..., f], and s2 = a A2ᵀ; [gate, up] = y + scale * s1 B1ᵀ.

    y is left as it was.
    """
    gate, up = _gate_and_up(y, s1, lora_B1, scale, offsets, segments)
    a = _owned(activation(gate, up, weights), offsets).to(y.dtype)
    return a, shrink(a, lora_A2, offsets)


def gate_backward_(
    da: Tensor,
    ds2: Tensor,
    y: Tensor,
    s1: Tensor,
    lora_B1: Tensor,
    scale: float,
    lora_A2: Tensor,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dy, ds1 = scale * dy B1, a and d_weights, by da + ds2 A2."""
    gate, up = _gate_and_up(y, s1, lora_B1, scale, offsets, segments)
    a = _owned(activation(gate, up, weights), offsets).to(y.dtype)
    total = accumulated(da).clone()
    shrink_dgrad_(total, ds2, lora_A2, offsets)
    dy, d_weights = activation_backward(total, gate, up, weights)
    dy = _owned(dy, offsets).to(y.dtype)
    ds1 = expand_dgrad(dy, lora_B1, scale, offsets, segments)
    return dy, ds1, a, da.new_empty(0) if weights is None else _owned(d_weights, offsets)


def activation(gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """Return silu(gate) up, each token's multiplied by its weight."""
    return _weighted(torch.nn.functional.silu(gate) * up, weights)


def activation_backward(
    da: Tensor, gate: Tensor, up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of [gate, up], and of weights, without elements where there are none."""
    at = gate.sigmoid()
    silu = gate * at
    weighted = _weighted(da, weights)
    dy = torch.cat([weighted * up * (at + silu * (1 - at)), weighted * silu], dim=-1)
    if weights is None:
        return dy, da.new_empty(0)
    return dy, (da * silu * up).sum(-1).flatten().to(weights.dtype)


def _gate_and_up(
    y: Tensor,
    s1: Tensor,
    lora_B1: Tensor,
    scale: float,
    offsets: Tensor | None,
    segments: Sequence[int],
) -> tuple[Tensor, Tensor]:
    both = accumulated(y).clone()
    expand_(both, s1, lora_B1, scale, offsets, segments)
    gate, up = both.chunk(2, dim=-1)
    return gate, up


def _owned(rows: Tensor, offsets: Tensor | None) -> Tensor:
    """Return rows with zeros behind those of the last expert."""
    if offsets is None:
        return rows
    owned = torch.arange(len(rows), device=rows.device) < offsets[-1]
    return torch.where(owned.view(-1, *[1] * (rows.dim() - 1)), rows, torch.zeros_like(rows))


def _weighted(a: Tensor, weights: Tensor | None) -> Tensor:
    return a if weights is None else a * weights.view(*a.shape[:-1], 1)
