"""LoRA inside a base linear that is one GEMM on one rank: one op and one autograd node each way.

What else a base may be asked for, and all that travels between ranks, leaves the base closed
(`adapters.sandwich`); `adapters.one_gemm` says which calls open it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megalora.adapters.call import Call, a_grad, b_grad, deliver, main_grad_of
from megalora.adapters.collectives import done
from megalora.adapters.node import apply


class Opened(NamedTuple):
    """A base linear's weight [o, i] and the adapter of one call that opens it."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    call: Call


class _Context(FunctionCtx):
    """What backward finds of its forward."""

    call: Call
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]


class OpenedLinear(torch.autograd.Function):
    """A linear of a frozen W [o, i] with its adapter: y = x Wᵀ + bias + s Bᵀ, s = c x Aᵀ.

    dgrad: ds = c dY B, dX = dY W + ds A. wgrad: dA = dsᵀ x, dB = dYᵀ s. No collective.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _Context,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Return y [..., o]."""
        y, s = call.ops.linear(x, weight, lora_A, lora_B, call.scale, call.segments)
        ctx.call = call
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: _Context, dy: Tensor):  # type: ignore[override]
        """Return dX, dA and dB; only those that are asked for are computed."""
        call = ctx.call
        needs = ctx.needs_input_grad[:3]
        if not all(needs) or (call.a_param is None) != (call.b_param is None):
            return *_asked(dy, ctx, needs), None, None, None
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        how = (dy, x, s, weight, lora_A, lora_B, call.scale, call.segments)
        if call.a_param is None or call.b_param is None:
            return *call.ops.linear_backward(*how), None, None, None
        sums = main_grad_of(call.a_param, lora_A.shape), main_grad_of(call.b_param, lora_B.shape)
        dx = call.ops.linear_backward_(*sums, *how)
        d_a = deliver(None, call.a_param, lora_A.shape)
        return dx, d_a, deliver(None, call.b_param, lora_B.shape), None, None, None


def _asked(dy: Tensor, ctx: _Context, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return dX, dA and dB where one is not asked for, or one alone goes to a main_grad."""
    call = ctx.call
    needs_x, needs_a, needs_b = needs
    x, weight, lora_A, lora_B, s = ctx.saved_tensors
    dx = d_a = d_b = None
    if needs_x or needs_a:
        ds = call.ops.expand_dgrad(dy, lora_B, call.scale, None, call.segments)
        if needs_x:
            dx = torch.matmul(dy, weight)
            call.ops.shrink_dgrad_(dx, ds, lora_A)
        if needs_a:
            d_a = a_grad(ds, x, lora_A, call)
    if needs_b:
        d_b = b_grad(dy, s, lora_B, 1.0, call)
    return [dx, d_a, d_b]


def adapt_opened(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    call: Call,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y = x Wᵀ + bias + c x Aᵀ Bᵀ, for a base weight W that has no gradient."""
    return apply(OpenedLinear, x, lora_A, lora_B, weight, bias, call)


class _ExpertsContext(FunctionCtx):
    """What backward finds of its forward."""

    call: Call
    weights: list[Tensor]
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class OpenedExperts(torch.autograd.Function):
    """The frozen linears W [o, i] of experts with their adapters, tokens sorted by expert.

    y, dX, dA and dB of `OpenedLinear`, of each expert for its own tokens. No collective.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _ExpertsContext,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        weights: list[Tensor],
        offsets: Tensor,
        call: Call,
    ) -> Tensor:
        """Return y [n, o]."""
        how = (weights, lora_A, lora_B, call.scale, offsets, call.segments)
        y, s = call.ops.experts_linear(x, *how)
        ctx.call, ctx.weights = call, weights
        ctx.save_for_backward(x, lora_A, lora_B, offsets, s)
        return y

    @staticmethod
    def backward(ctx: _ExpertsContext, dy: Tensor):  # type: ignore[override]
        """Return dX, dA and dB."""
        call = ctx.call
        x, lora_A, lora_B, offsets, s = ctx.saved_tensors
        how = (dy, x, s, ctx.weights, lora_A, lora_B, call.scale, offsets, call.segments)
        a, b = call.a_param, call.b_param
        if a is not None and b is not None:
            sums = main_grad_of(a, lora_A.shape), main_grad_of(b, lora_B.shape)
            dx = call.ops.experts_linear_backward_(*sums, *how)
            gradients = deliver(None, a, lora_A.shape), deliver(None, b, lora_B.shape)
        else:
            dx, d_a, d_b = call.ops.experts_linear_backward(*how)
            gradients = (
                deliver(done(d_a), a, lora_A.shape),
                deliver(done(d_b), b, lora_B.shape),
            )
        return dx, *gradients, None, None, None


def adapt_opened_experts(
    x: Tensor,
    weights: list[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    call: Call,
) -> Tensor:
    """Return y = x Wᵀ + c x Aᵀ Bᵀ of every token's expert, for weights that have no gradient.

    x: [n, i] sorted by expert. offsets: int64 [E], the inclusive sums of the experts' tokens.
    """
    return apply(OpenedExperts, x, lora_A, lora_B, weights, offsets, call)
