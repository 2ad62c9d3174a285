"""The ops between a wide tensor of tokens and a thin one, in plain torch (`ops.reference`)."""

from collections.abc import Sequence

from torch import Tensor

from megalora.ops.blocks import accumulated, flat, gather, outer, spans, spread
from megalora.ops.philox import dropout_mask


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return x in fp32 or fp64, dropped elements zero and kept ones multiplied by 1 / (1 - p)."""
    x = accumulated(x)
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError(f"seed is missing: dropout p={p} needs an int64 tensor [1]")
    return x * dropout_mask(x.shape, p, seed) / (1.0 - p)


def shrink(
    x: Tensor,
    lora_A: Tensor,
    offsets: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return s = dropout(x) Aᵀ, [..., P*r]."""
    rows, weight = flat(dropped(x, p, seed)), accumulated(lora_A)
    s = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, span in spans(offsets, rows):
        s[span] = rows[span] @ weight[expert].mT
    return s.view(*x.shape[:-1], weight.shape[-2]).to(x.dtype)


def expand_(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> None:
    """Add scale * s Bᵀ to y in place, each block of columns reading its own rank block of s."""
    rows, weight = flat(accumulated(s)), spread(accumulated(lora_B), segments)
    delta = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, span in spans(offsets, rows):
        delta[span] = scale * rows[span] @ weight[expert].mT
    y.copy_(accumulated(y) + delta.view(y.shape))


def expand_dgrad(
    dy: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return ds = scale * dy B, [..., P*r]."""
    rows, weight = flat(accumulated(dy)), spread(accumulated(lora_B), segments)
    ds = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in spans(offsets, rows):
        ds[span] = scale * rows[span] @ weight[expert]
    return ds.view(*dy.shape[:-1], weight.shape[-1]).to(dy.dtype)


def expand_wgrad(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return dB = scale * dyᵀ s in the shape of lora_B."""
    return _d_b(dy, s, scale, offsets, segments).to(dy.dtype)


def expand_backward(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return ds and dB: `expand_dgrad` and `expand_wgrad` in one call."""
    ds = expand_dgrad(dy, lora_B, scale, offsets, segments)
    return ds, expand_wgrad(dy, s, lora_B, scale, offsets, segments)


def shrink_dgrad_(
    dx: Tensor,
    ds: Tensor,
    lora_A: Tensor,
    offsets: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Add dropout(ds A) to dx in place, with the mask of the forward pass."""
    rows, weight = flat(accumulated(ds)), accumulated(lora_A)
    delta = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in spans(offsets, rows):
        delta[span] = rows[span] @ weight[expert]
    dx.copy_(accumulated(dx) + dropped(delta.view(dx.shape), p, seed))


def shrink_wgrad(
    ds: Tensor,
    x: Tensor,
    offsets: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dA = dsᵀ dropout(x), [P*r, in] or [E, P*r, in]."""
    return _d_a(ds, x, offsets, p, seed).to(x.dtype)


def expand_wgrad_(
    d_b: Tensor,
    dy: Tensor,
    s: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> None:
    """Add scale * dyᵀ s to d_b in place."""
    d_b.copy_(accumulated(d_b) + _d_b(dy, s, scale, offsets, segments))


def expand_backward_(
    d_b: Tensor,
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return ds and add dB to d_b in place: `expand_dgrad` and `expand_wgrad_` in one call."""
    expand_wgrad_(d_b, dy, s, scale, offsets, segments)
    return expand_dgrad(dy, lora_B, scale, offsets, segments)


def shrink_wgrad_(
    d_a: Tensor,
    ds: Tensor,
    x: Tensor,
    offsets: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Add dsᵀ dropout(x) to d_a in place."""
    d_a.copy_(accumulated(d_a) + _d_a(ds, x, offsets, p, seed))


def _d_b(
    dy: Tensor, s: Tensor, scale: float, offsets: Tensor | None, segments: Sequence[int]
) -> Tensor:
    full = scale * outer(flat(accumulated(dy)), flat(accumulated(s)), offsets)
    return gather(full, segments)


def _d_a(ds: Tensor, x: Tensor, offsets: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    return outer(flat(accumulated(ds)), flat(dropped(x, p, seed)), offsets)
