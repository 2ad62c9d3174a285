"""Call the compiled ops: importing this module loads `_C.so` and gives its ops shapes and autograd.

The functions are those of `megalora.ops.Ops`, thin over `torch.ops.megalora`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def _load(library: Path) -> None:
    """Load the compiled library; raise ImportError that says how to build it where it is absent."""
    if not library.exists():
        raise ImportError(
            f"{library} is not built: run `pip install -e . --no-build-isolation` in the checkout, "
            "or use the plain torch ops with MEGALORA_OPS=reference"
        )
    torch.ops.load_library(library)


_load(Path(__file__).parents[1] / "_C.so")
_ops = torch.ops.megalora


def shrink(
    x: Tensor,
    lora_A: Tensor,
    offsets: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return s = dropout(x) Aᵀ, [..., P*r]; differentiable in x and lora_A."""
    return _ops.shrink(x, lora_A, offsets, p, seed)


def expand_(
    y: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> None:
    """Add scale * s Bᵀ to y in place."""
    _ops.expand_(y, s, lora_B, scale, offsets, segments)


def expand_dgrad(
    dy: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return ds = scale * dy B, [..., P*r]."""
    return _ops.expand_dgrad(dy, lora_B, scale, offsets, segments)


def expand_wgrad(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> Tensor:
    """Return dB = scale * dyᵀ s in the shape of lora_B, whose values are not read."""
    return _ops.expand_wgrad(dy, s, lora_B, scale, offsets, segments)


def expand_backward(
    dy: Tensor,
    s: Tensor,
    lora_B: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Return ds and dB: `expand_dgrad` and `expand_wgrad` in one call."""
    return _ops.expand_backward(dy, s, lora_B, scale, offsets, segments)


def shrink_dgrad_(
    dx: Tensor,
    ds: Tensor,
    lora_A: Tensor,
    offsets: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Add dropout(ds A) to dx in place, with the mask of the forward pass."""
    _ops.shrink_dgrad_(dx, ds, lora_A, offsets, p, seed)


def shrink_wgrad(
    ds: Tensor,
    x: Tensor,
    offsets: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return dA = dsᵀ dropout(x), [P*r, in] or [E, P*r, in]."""
    return _ops.shrink_wgrad(ds, x, offsets, p, seed)


def expand_wgrad_(
    d_b: Tensor,
    dy: Tensor,
    s: Tensor,
    scale: float,
    offsets: Tensor | None = None,
    segments: Sequence[int] = (),
) -> None:
    """Add scale * dyᵀ s to d_b in place."""
    _ops.expand_wgrad_(d_b, dy, s, scale, offsets, segments)


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
    return _ops.expand_backward_(d_b, dy, s, lora_B, scale, offsets, segments)


def shrink_wgrad_(
    d_a: Tensor,
    ds: Tensor,
    x: Tensor,
    offsets: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Add dsᵀ dropout(x) to d_a in place."""
    _ops.shrink_wgrad_(d_a, ds, x, offsets, p, seed)


# === Shapes, for torch.compile and FakeTensor ===


@torch.library.register_fake("megalora::shrink")
def _(x, lora_A, offsets, p, seed):
    return x.new_empty(*x.shape[:-1], lora_A.shape[-2])


@torch.library.register_fake("megalora::expand_")
def _(y, s, lora_B, scale, offsets, segments):
    return None


@torch.library.register_fake("megalora::expand_dgrad")
def _(dy, lora_B, scale, offsets, segments):
    return dy.new_empty(*dy.shape[:-1], max(1, len(segments)) * lora_B.shape[-1])


@torch.library.register_fake("megalora::expand_wgrad")
def _(dy, s, lora_B, scale, offsets, segments):
    return dy.new_empty(lora_B.shape)


@torch.library.register_fake("megalora::expand_backward")
def _(dy, s, lora_B, scale, offsets, segments):
    ds = dy.new_empty(*dy.shape[:-1], max(1, len(segments)) * lora_B.shape[-1])
    return ds, dy.new_empty(lora_B.shape)


@torch.library.register_fake("megalora::shrink_dgrad_")
def _(dx, ds, lora_A, offsets, p, seed):
    return None


@torch.library.register_fake("megalora::shrink_wgrad")
def _(ds, x, offsets, p, seed):
    experts = () if offsets is None else (offsets.shape[0],)
    return x.new_empty(*experts, ds.shape[-1], x.shape[-1])


@torch.library.register_fake("megalora::expand_wgrad_")
def _(d_b, dy, s, scale, offsets, segments):
    return None


@torch.library.register_fake("megalora::expand_backward_")
def _(d_b, dy, s, lora_B, scale, offsets, segments):
    return dy.new_empty(*dy.shape[:-1], max(1, len(segments)) * lora_B.shape[-1])


@torch.library.register_fake("megalora::shrink_wgrad_")
def _(d_a, ds, x, offsets, p, seed):
    return None


# === Autograd of shrink, the one op that layers may differentiate through ===


def _save_shrink(ctx, inputs: tuple, output: Tensor) -> None:
    x, lora_A, offsets, p, seed = inputs
    ctx.save_for_backward(x, lora_A, offsets, seed)
    ctx.p = p


def _shrink_backward(ctx, ds: Tensor):
    """dgrad: dx = dropout(ds A). wgrad: dA = dsᵀ dropout(x)."""
    x, lora_A, offsets, seed = ctx.saved_tensors
    dx = d_a = None
    if ctx.needs_input_grad[0]:
        dx = torch.zeros_like(x)
        shrink_dgrad_(dx, ds, lora_A, offsets, p=ctx.p, seed=seed)
    if ctx.needs_input_grad[1]:
        d_a = shrink_wgrad(ds, x, offsets, p=ctx.p, seed=seed)
    return dx, d_a, None, None, None


torch.library.register_autograd("megalora::shrink", _shrink_backward, setup_context=_save_shrink)
