"""Load the compiled ops of `_C.so`, `torch.ops.megalora`, and give them shapes.

They are what the autograd functions of `adapters` are made of, and have no gradients of their own,
nor a dtype of autocast's.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megalora.built import HOW_TO_BUILD, LIBRARY, misfit
from megalora.ops.protocol import Ops
from megalora.printable import printable


@cache
def load() -> Ops:
    """Return the compiled ops, whose schemas have the names and defaults of `Ops`."""
    _load_library(LIBRARY)
    for name, shape in _SHAPES.items():
        torch.library.register_fake(f"megalora::{name}", shape)
    return cast(Ops, torch.ops.megalora)


def _load_library(library: Path) -> None:
    """Load the compiled library; raise ImportError that says what to do where that fails."""
    if not library.exists():
        reason: str | None = "it is not built"
    elif (reason := misfit(library, torch.__version__, torch.version.cuda)) is None:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            reason = printable(error.__cause__ or error)
    if reason is not None:
        raise ImportError(f"{library} cannot be loaded: {reason}: {HOW_TO_BUILD}")


# === Shapes, for torch.compile and FakeTensor, which leave out what has its default ===


def _s(x: Tensor, lora_A: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], lora_A.shape[-2])


def _ds(
    dy: Tensor, lora_B: Tensor, _scale: float, _offsets: object = None, segments: Sequence[int] = ()
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], max(1, len(segments)) * lora_B.shape[-1])


def _d_b(dy: Tensor, _s: Tensor, lora_B: Tensor, *_: object) -> Tensor:
    return dy.new_empty(lora_B.shape)


def _d_a(ds: Tensor, x: Tensor, offsets: Tensor | None = None, *_: object) -> Tensor:
    experts = () if offsets is None else offsets.shape
    return x.new_empty(*experts, ds.shape[-1], x.shape[-1])


def _y_s(x: Tensor, weight: Tensor, lora_A: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _s(x, lora_A)


def _dx(
    _d_a: Tensor, _d_b: Tensor, dy: Tensor, _x: Tensor, _s: Tensor, weight: Tensor, *_: object
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def _dx_d_a_d_b(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    d_a, d_b = lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)
    return _dx(d_a, d_b, dy, x, s, weight), d_a, d_b


def _experts_y_s(
    x: Tensor, weights: Sequence[Tensor], lora_A: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    padded = -(-lora_A.shape[1] // 8) * 8
    return x.new_empty(len(x), weights[0].shape[0]), x.new_empty(len(x), padded)


def _gated_mlp(
    x: Tensor,
    weight1: Tensor,
    lora_A1: Tensor,
    _lora_B1: Tensor,
    _scale1: float,
    weight2: Tensor,
    lora_A2: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s1 = _y_s(x, weight1, lora_A1)
    return x.new_empty(*x.shape[:-1], weight2.shape[0]), y, s1, _s(x, lora_A2)


def _dx_d_weights(
    _dz: Tensor, x: Tensor, _y: Tensor, _s1: Tensor, _s2: Tensor, *how: object
) -> tuple[Tensor, Tensor]:
    # Beside weights, what is given by place: two linears of four each, and segments.
    weights = cast(Tensor | None, how[9] if len(how) > 9 else None)
    return torch.empty_like(x), x.new_empty(0) if weights is None else torch.empty_like(weights)


def _gated_mlp_backward(
    dz: Tensor, x: Tensor, y: Tensor, s1: Tensor, s2: Tensor, *how: object
) -> tuple[Tensor, ...]:
    dx, d_weights = _dx_d_weights(dz, x, y, s1, s2, *how)
    factors = [cast(Tensor, how[place]) for place in (1, 2, 5, 6)]
    return dx, *(factor.new_empty(factor.shape) for factor in factors), d_weights


def _gate_backward(
    da: Tensor, _ds2: Tensor, y: Tensor, s1: Tensor, *how: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Behind B1, the scale, A2, offsets and segments, which are given by place.
    weights = cast(Tensor | None, how[5] if len(how) > 5 else None)
    d_weights = da.new_empty(0) if weights is None else torch.empty_like(weights)
    return torch.empty_like(y), s1.new_empty(s1.shape), da.new_empty(da.shape), d_weights


def _nothing(*_: object) -> None:
    return None


_SHAPES = {
    "shrink": _s,
    "expand_": _nothing,
    "expand_dgrad": _ds,
    "expand_wgrad": _d_b,
    "expand_backward": lambda dy, s, lora_B, *how: (_ds(dy, lora_B, *how), _d_b(dy, s, lora_B)),
    "shrink_dgrad_": _nothing,
    "shrink_wgrad": _d_a,
    "expand_wgrad_": _nothing,
    "expand_backward_": lambda d_b, dy, s, lora_B, *how: _ds(dy, lora_B, *how),
    "shrink_wgrad_": _nothing,
    "linear": _y_s,
    "linear_backward": _dx_d_a_d_b,
    "linear_backward_": _dx,
    "experts_linear": _experts_y_s,
    "experts_linear_backward": lambda dy, x, s, weights, lora_A, lora_B, *how: (
        torch.empty_like(x),
        torch.empty_like(lora_A),
        torch.empty_like(lora_B),
    ),
    "experts_linear_backward_": lambda d_a, d_b, dy, x, *how: torch.empty_like(x),
    # What has no numbers is planned for Hopper.
    "experts_linear_is_fused": lambda weight, experts, ranks: True,
    "gate_": lambda y, s1, lora_B1, scale, lora_A2, *how: (
        y.new_empty(*y.shape[:-1], lora_A2.shape[-1]),
        _s(y, lora_A2),
    ),
    "gate_backward_": _gate_backward,
    "gated_mlp_is_fused": lambda weight2, rank1, rank2: False,
    "gated_mlp": _gated_mlp,
    "gated_mlp_backward": _gated_mlp_backward,
    "gated_mlp_backward_": lambda d_a1, d_b1, d_a2, d_b2, *given: _dx_d_weights(*given),
}
