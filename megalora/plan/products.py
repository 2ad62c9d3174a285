"""FLOPs of matrix products by their shapes: torch's own, and megalora's, base and adapter apart."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

type Shape = Sequence[int]


class Parts(NamedTuple):
    """FLOPs of one product: with the weight of a base, and with the factors of its adapter."""

    base: int
    adapter: int


def _rows(tokens: Shape) -> int:
    return prod(tokens[:-1])


def _times(tokens: Shape, weight: Shape) -> int:
    """Return the FLOPs of tokens [..., i] with a weight [(E,) o, i], each row with one expert's."""
    return 2 * _rows(tokens) * weight[-2] * weight[-1]


def _factor(tokens: int, weight: int, *, times: int = 1) -> Callable[[Sequence[Shape]], Parts]:
    """Return the formula of a product of tokens with one factor, by their places."""
    return lambda shapes: Parts(0, times * _times(shapes[tokens], shapes[weight]))


def _wgrad(tokens: int, width: int) -> Callable[[Sequence[Shape]], Parts]:
    """Return the formula of an outer product of tokens [..., p] with tokens [..., q]."""
    return lambda shapes: Parts(0, 2 * prod(shapes[tokens]) * shapes[width][-1])


def _d_b(dy: int, s: int, lora_B: int) -> Callable[[Sequence[Shape]], Parts]:
    """Return the formula of dB: each column of dY meets the ranks of its own projection."""
    return _factor(dy, lora_B)


def _both(x: int, weight: int, *, times: int) -> Callable[[Sequence[Shape]], Parts]:
    """Return the formula of a linear with its adapter; A and B are the last two before offsets."""

    def parts(shapes: Sequence[Shape]) -> Parts:
        factors = [shape for shape in shapes[weight:] if len(shape) > 1][-2:]
        adapter = sum(_times(shapes[x], factor) for factor in factors)
        return Parts(_times(shapes[x], shapes[weight]), times * adapter)

    return parts


# By the places of the tensors that each op is given (`ops.protocol`).
_OURS: Mapping[str, Callable[[Sequence[Shape]], Parts]] = {
    "shrink": _factor(0, 1),
    "expand_": _factor(0, 2),
    "expand_dgrad": _factor(0, 1),
    "expand_wgrad": _d_b(0, 1, 2),
    "expand_backward": _factor(0, 2, times=2),
    "shrink_dgrad_": _factor(0, 2),
    "shrink_wgrad": _wgrad(0, 1),
    "expand_wgrad_": lambda shapes: Parts(0, _times(shapes[1], shapes[0])),
    "expand_backward_": _factor(1, 3, times=2),
    "shrink_wgrad_": _wgrad(1, 2),
    "linear": _both(0, 1, times=1),
    "linear_backward": _both(0, 3, times=2),
    "linear_backward_": _both(2, 5, times=2),
    "experts_linear": _both(0, 1, times=1),
    "experts_linear_backward": _both(0, 3, times=2),
    "experts_linear_backward_": _both(2, 5, times=2),
}


def ours(op: str, shapes: Sequence[Shape]) -> Parts | None:
    """Return the FLOPs of an op of megalora by its name, as `megalora.shrink`; None of others."""
    room, _, name = op.partition(".")
    formula = _OURS.get(name) if room == "megalora" else None
    return formula and formula(shapes)


def flops(
    func: OpOverload,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    out: object,
    given: Sequence[Tensor],
) -> int | None:
    """Return the FLOPs of an operation with the tensors that it is given, None where it is none."""
    parts = ours(str(func.overloadpacket), [tensor.shape for tensor in given])
    if parts is not None:
        return sum(parts)
    formula = flop_registry.get(func.overloadpacket)
    return formula and formula(*args, **kwargs, out_val=out)
