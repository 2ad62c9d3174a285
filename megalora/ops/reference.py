"""Say in plain torch what every op of `megalora::` must compute.

x, dx: [..., in], y, dy: [..., out], s, ds: [..., P*r], lora_A, d_a: [P*r, in] or [E, P*r, in],
lora_B, d_b: [out, r] or [E, out, r], weight: [out, in]. Everything is computed in fp32 (fp64 for
fp64 inputs) and rounded once to the dtype of the result; d_a and d_b, which are added to, may be
fp32 beside narrower tokens. Rows past the last offset are zero in results, untouched in place.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalora.ops.philox import dropout_mask


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return x in fp32 or fp64, dropped elements zero and kept ones multiplied by 1 / (1 - p)."""
    x = _accumulated(x)
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
    rows, weight = _rows(dropped(x, p, seed)), _accumulated(lora_A)
    s = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, span in _spans(offsets, rows):
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
    rows, weight = _rows(_accumulated(s)), spread(_accumulated(lora_B), segments)
    delta = rows.new_zeros(rows.shape[0], weight.shape[-2])
    for expert, span in _spans(offsets, rows):
        delta[span] = scale * rows[span] @ weight[expert].mT
    y.copy_(_accumulated(y) + delta.view(y.shape))


def expand_dgrad(
    dy: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return ds = scale * dy B, [..., P*r]."""
    rows, weight = _rows(_accumulated(dy)), spread(_accumulated(lora_B), segments)
    ds = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in _spans(offsets, rows):
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
    rows, weight = _rows(_accumulated(ds)), _accumulated(lora_A)
    delta = rows.new_zeros(rows.shape[0], weight.shape[-1])
    for expert, span in _spans(offsets, rows):
        delta[span] = rows[span] @ weight[expert]
    dx.copy_(_accumulated(dx) + dropped(delta.view(dx.shape), p, seed))


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
    d_b.copy_(_accumulated(d_b) + _d_b(dy, s, scale, offsets, segments))


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
    d_a.copy_(_accumulated(d_a) + _d_a(ds, x, offsets, p, seed))


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return y = x Wᵀ + s Bᵀ, [..., out], and s = scale * x Aᵀ, [..., P*r]."""
    s = (scale * _product(x, _accumulated(lora_A).mT)).to(x.dtype)
    # Not a view: whoever gets it may change it in place.
    y = _product(x, _accumulated(weight).mT).clone()
    expand_(y, s, lora_B, 1.0, segments=segments)
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
    ds = expand_dgrad(dy, lora_B, scale, segments=segments)
    dx = _product(dy, _accumulated(weight))
    shrink_dgrad_(dx, ds, lora_A)
    d_b = expand_wgrad(dy, s, lora_B, 1.0, segments=segments)
    return dx.to(dy.dtype), shrink_wgrad(ds, x), d_b


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
    dx = _product(dy, _accumulated(weight))
    shrink_dgrad_(dx, ds, lora_A)
    shrink_wgrad_(d_a, ds, x)
    expand_wgrad_(d_b, dy, s, 1.0, segments=segments)
    return dx.to(dy.dtype)


def owners(segments: Sequence[int], num_columns: int, device: torch.device) -> Tensor:
    """Return the index of the projection of each output column, int64 [num_columns]."""
    if not segments:
        return torch.zeros(num_columns, dtype=torch.int64, device=device)
    period = torch.arange(len(segments), device=device).repeat_interleave(
        torch.tensor(segments, device=device)
    )
    return period.repeat(num_columns // sum(segments))


def spread(lora_B: Tensor, segments: Sequence[int]) -> Tensor:
    """Return B as [..., out, P*r]: each row in the rank block of its projection, zero elsewhere."""
    num_columns = lora_B.shape[-2]
    owner = owners(segments, num_columns, lora_B.device)
    one_hot = torch.nn.functional.one_hot(owner, max(1, len(segments))).to(lora_B.dtype)
    return (one_hot[:, :, None] * lora_B[..., None, :]).flatten(-2)


def gather(full: Tensor, segments: Sequence[int]) -> Tensor:
    """Return [..., out, r] from [..., out, P*r]: each row's own rank block, as `spread` put it."""
    num_columns = full.shape[-2]
    owner = owners(segments, num_columns, full.device)
    blocks = full.unflatten(-1, (max(1, len(segments)), -1))
    return blocks[..., torch.arange(num_columns, device=full.device), owner, :]


def _d_b(
    dy: Tensor, s: Tensor, scale: float, offsets: Tensor | None, segments: Sequence[int]
) -> Tensor:
    full = scale * _outer(_rows(_accumulated(dy)), _rows(_accumulated(s)), offsets)
    return gather(full, segments)


def _d_a(ds: Tensor, x: Tensor, offsets: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    return _outer(_rows(_accumulated(ds)), _rows(dropped(x, p, seed)), offsets)


def _outer(left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return left.mT @ right
    product = left.new_zeros(offsets.numel(), left.shape[1], right.shape[1])
    for expert, span in _spans(offsets, left):
        product[expert] = left[span].mT @ right[span]
    return product


def _spans(offsets: Tensor | None, rows: Tensor) -> Iterator[tuple[int | slice, slice]]:
    """Yield (index into the weights, slice of rows): one for each expert, or one for all rows."""
    if offsets is None:
        yield slice(None), slice(0, rows.shape[0])
        return
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        yield expert, slice(start, end)
        start = end


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return (_rows(_accumulated(x)) @ matrix).view(*x.shape[:-1], matrix.shape[1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
