"""LoRA around a base linear where nothing travels between ranks: one autograd node, after the base.

The update of y has all of the adapter's gradients but that of x, which waits for the base's own: a
hook on the base's input adds ds A in place into dX, as `adapters.sandwich` does by a second node.
Where x is small autograd adds the two itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megalora.adapters.call import Call, a_grad, deliver, main_grad_of, x_grad
from megalora.adapters.node import apply

# Bytes of x up to which one more pass over dX takes less time than a hook: measured on a CPU.
_SMALL = 2**18


class XGrad:
    """Adds ds A to the gradient that the base gives its input: autograd's hook."""

    __slots__ = ("call", "given")

    def __init__(self, call: Call) -> None:
        self.call = call
        # ds and A, from when they are known until they are used: no activation lives longer.
        self.given: tuple[Tensor, Tensor] | None = None

    def __call__(self, dx: Tensor) -> Tensor:
        """Return dx + ds A, in place."""
        assert self.given is not None
        (ds, lora_A), self.given = self.given, None
        call = self.call
        call.ops.shrink_dgrad_(dx, ds, lora_A, call.a_offsets, call.dropout, call.seed)
        return dx


class _Context(FunctionCtx):
    """What backward finds of its forward."""

    call: Call
    hook: XGrad | None
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]


class Update(torch.autograd.Function):
    """y + c s Bᵀ, added in place, with s = x Aᵀ.

    dgrad: ds = c dY B; dX = ds A, unless a hook adds it to the base's. wgrad: dA, dB.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _Context,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        call: Call,
        hook: XGrad | None,
    ) -> Tensor:
        """Return y [..., o] for x [..., i]."""
        s = call.ops.shrink(x, lora_A, call.a_offsets, call.dropout, call.seed)
        call.ops.expand_(call.covered(y), s, lora_B, call.scale, call.b_offsets, call.segments)
        ctx.call, ctx.hook = call, hook
        ctx.save_for_backward(x, lora_A, lora_B, s)
        # A fresh handle: y may be a view that autograd forbids to change in place.
        return y.detach()

    @staticmethod
    def backward(ctx: _Context, dy: Tensor):  # type: ignore[override]
        """Pass dY on to the base; give dA, dB, and dX or what it is made of."""
        call, hook = ctx.call, ctx.hook
        x, lora_A, lora_B, s = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        ds, d_b = y_gradients(call.covered(dy), s, lora_B, call, needs_b)
        d_a = a_grad(ds, x, lora_A, call) if needs_a else None
        dx = None
        if hook is not None:
            hook.given = ds, lora_A
        elif needs_x:
            dx = x_grad(None, ds, x, lora_A, call)
        return dy, dx, d_a, d_b, None, None


def y_gradients(
    dy: Tensor, s: Tensor, lora_B: Tensor, call: Call, needs_b: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ds, and what autograd gets for B."""
    how = (lora_B, call.scale, call.b_offsets, call.segments)
    if not needs_b:
        return call.ops.expand_dgrad(dy, *how), None
    if call.b_param is None:
        return call.ops.expand_backward(dy, s, *how)
    ds = call.ops.expand_backward_(main_grad_of(call.b_param, lora_B.shape), dy, s, *how)
    return ds, deliver(None, call.b_param, lora_B.shape)


def run_base[Rest](
    base_forward: Callable[[Tensor], tuple[Tensor, Rest]], x: Tensor, call: Call
) -> tuple[Tensor, Tensor, Rest, XGrad | None]:
    """Run a base; return x for its adapter, y, the rest, and what will add ds A to the base's dX.

    The last is None where autograd adds them itself.
    """
    if x.nbytes <= _SMALL:
        y, rest = base_forward(x)
        return x, y, rest, None
    # A handle of its own, whose gradient is the base's alone.
    x = x.view_as(x)
    y, rest = base_forward(x)
    hook = None
    if x.requires_grad and y.requires_grad:
        x.register_hook(hook := XGrad(call))
    return x, y, rest, hook


def adapt_on_one_rank[Rest](
    base_forward: Callable[[Tensor], tuple[Tensor, Rest]],
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    call: Call,
) -> tuple[Tensor, Rest]:
    """Run a base linear with its adapter around it, as `sandwich.adapt` does."""
    x, y, rest, hook = run_base(base_forward, x, call)
    return apply(Update, y, x, lora_A, lora_B, call, hook), rest


def add_on_one_rank(x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> Tensor:
    """Add an adapter whose input is known only after its base has run, as `add_update` does."""
    return apply(Update, y, x, lora_A, lora_B, call, None)
