"""GPU kernels as shapes: what they read and write, and their FLOPs, without numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]

_SCHEMAS = (
    "attention(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor)",
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, int pairs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "experts(Tensor x, Tensor[] weights) -> Tensor",
    "experts_dgrad(Tensor dy, Tensor[] weights) -> Tensor",
    "experts_wgrad(Tensor dy, Tensor x, Tensor[] weights) -> Tensor[]",
    "experts_wgrad_(Tensor dy, Tensor x) -> ()",
    "wgrad_(Tensor(a!) main_grad, Tensor dy, Tensor x) -> ()",
)
_library = torch.library.Library("megalora_plan", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
ops: Any = torch.ops.megalora_plan


# === What they write ===


def _attention(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return out [..., heads, d_v], and the log of each row's sum [..., heads] in fp32."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and the workspace.

    It has dq summed in fp32 and the sums of d_out out, and where queries share keys a dk and dv of
    each head, which are added up at the end (cuDNN's and FlashAttention 2's and 3's backward).
    """
    workspace = 4 * q.numel() + 4 * q.numel() // q.shape[-1]
    if q.shape[-2] != k.shape[-2]:
        sharing = q.shape[-2] // k.shape[-2]
        workspace += sharing * (k.numel() + v.numel()) * k.element_size()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    return d_q, d_k, d_v, q.new_empty(workspace, dtype=torch.uint8)


def _experts(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


def _experts_dgrad(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return dy.new_empty(dy.shape[0], weights[0].shape[1])


def _experts_wgrad(dy: Tensor, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


def _nothing(*_: object) -> None:
    return None


for _name, _shape in (
    ("attention", _attention),
    ("attention_backward", _attention_backward),
    ("experts", _experts),
    ("experts_dgrad", _experts_dgrad),
    ("experts_wgrad", _experts_wgrad),
    ("experts_wgrad_", _nothing),
    ("wgrad_", _nothing),
):
    _library.impl(_name, _shape, "Meta")


# === What they compute ===


@register_flop_formula(ops.attention)
def _attention_flops(q: Shape, k: Shape, v: Shape, pairs: int, **_: object) -> int:
    """Return FLOPs of q kᵀ and p v for the pairs of a query and a key that see each other.

    pairs: of one head, over the whole microbatch; a causal mask has about half of all, as in
    Megatron's count of a model's FLOPs.
    """
    return 2 * q[-2] * pairs * (q[-1] + v[-1])


@register_flop_formula(ops.attention_backward)
def _attention_backward_flops(
    d_out: Shape, q: Shape, k: Shape, v: Shape, pairs: int, **_: object
) -> int:
    """Return FLOPs of q kᵀ once more, dq and dk (three times d) and of dp and dv (twice d_v)."""
    return 2 * q[-2] * pairs * (3 * q[-1] + 2 * v[-1])


def _of_rows(rows: Shape, weights: Sequence[Shape], **_: object) -> int:
    out, inner = weights[0]
    return 2 * rows[0] * out * inner


def _of_wgrad(dy: Shape, x: Shape, *_: object, **__: object) -> int:
    return 2 * _rows(x) * dy[-1] * x[-1]


def _rows(x: Shape) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return rows


def _of_main_wgrad(main_grad: Shape, dy: Shape, x: Shape, **_: object) -> int:
    return 2 * _rows(x) * dy[-1] * x[-1]


register_flop_formula(ops.experts)(_of_rows)
register_flop_formula(ops.experts_dgrad)(_of_rows)
register_flop_formula(ops.experts_wgrad)(_of_wgrad)
register_flop_formula(ops.experts_wgrad_)(_of_wgrad)
register_flop_formula(ops.wgrad_)(_of_main_wgrad)
