"""One call of an adapter: all about it but its tensors, and where its gradients go."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.collectives import Pending
from megalora.adapters.routes import Route
from megalora.ops import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Everything about one call of an adapter but its tensors.

    group: tensor-parallel group of the token tensors; a_group, b_group: groups over which lora_A
    and lora_B are sharded. a_offsets, b_offsets: token offsets [E] of a grouped factor, None where
    the factor is one for all tokens. segments: of the columns of y that lora_B (gathered where the
    route says so) covers. columns: how many of y's it covers, the first ones; None for all.
    seed: int64 [1] of the dropout mask, None without dropout.
    a_param, b_param: the factors' parameters where backward adds their gradients to Megatron's
    main_grad (gradient accumulation fusion), None where autograd gets them.
    """

    ops: Ops
    route: Route
    scale: float
    segments: list[int]
    columns: int | None = None
    group: ProcessGroup | None = None
    a_group: ProcessGroup | None = None
    b_group: ProcessGroup | None = None
    a_offsets: Tensor | None = None
    b_offsets: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    a_param: torch.nn.Parameter | None = None
    b_param: torch.nn.Parameter | None = None

    def covered(self, y: Tensor) -> Tensor:
        """Return the columns of y, or of its gradient, that lora_B covers: a view."""
        return y if self.columns is None else y[..., : self.columns]


def x_grad(dx: Tensor | None, ds: Tensor, x: Tensor, full_a: Tensor, call: Call) -> Tensor:
    """Return dx + ds A, in place; written in one pass where there is no dx of the base's yet."""
    if dx is None and call.a_offsets is None and call.dropout == 0.0:
        return torch.matmul(ds, full_a)
    if dx is None:
        dx = torch.zeros_like(x)
    call.ops.shrink_dgrad_(dx, ds, full_a, call.a_offsets, call.dropout, call.seed)
    return dx


def a_grad(ds: Tensor, x: Tensor, lora_A: Tensor, call: Call) -> Tensor | None:
    """Return what autograd gets for an A that is used as it is: dA, or main_grad's stand-in."""
    how = (ds, x, call.a_offsets, call.dropout, call.seed)
    if call.a_param is None:
        return call.ops.shrink_wgrad(*how)
    call.ops.shrink_wgrad_(main_grad_of(call.a_param, lora_A.shape), *how)
    return deliver(None, call.a_param, lora_A.shape)


def b_grad(dy: Tensor, s: Tensor, lora_B: Tensor, scale: float, call: Call) -> Tensor | None:
    """Return what autograd gets for a B that is used as it is: dB, or main_grad's stand-in.

    scale: 1.0 where s has the call's in it.
    """
    how = (scale, call.b_offsets, call.segments)
    if call.b_param is None:
        return call.ops.expand_wgrad(dy, s, lora_B, *how)
    call.ops.expand_wgrad_(main_grad_of(call.b_param, lora_B.shape), dy, s, *how)
    return deliver(None, call.b_param, lora_B.shape)


def main_grad_of(param: torch.nn.Parameter, shape: Sequence[int]) -> Tensor:
    """Return Megatron's gradient buffer of a parameter in the shape of the factor's rows."""
    return param.main_grad.view(shape)  # type: ignore[attr-defined]


def deliver(
    gradient: Pending | None, param: torch.nn.Parameter | None, shape: Sequence[int]
) -> Tensor | None:
    """Return what autograd gets: the gradient, or a stand-in where main_grad has it already.

    DDP's hook, which starts the reduction, runs only where autograd has something to accumulate,
    and drops it where grad_added_to_main_grad is set.
    """
    if param is None:
        return gradient and gradient.wait()
    if gradient is not None:
        main_grad_of(param, shape).add_(gradient.wait())
    param.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return param.new_empty(shape)
