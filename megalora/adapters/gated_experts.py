"""LoRA inside the experts of a TEGroupedMLP on one rank, whose grouped linears stay closed.

Their low-rank terms are added, and fc2's shrink is taken, in the activation's own pass between the
two grouped GEMMs: `gate_` and `gate_backward_`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron.core.transformer.moe.experts import TEGroupedMLP
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megalora.adapters.call import Call, a_grad, b_grad, x_grad
from megalora.adapters.experts import GroupedAdapter, on_device
from megalora.adapters.gating import Choice, all_learn, has_hooks, is_swiglu, takes_weights
from megalora.adapters.node import apply
from megalora.adapters.on_one_rank import XGrad, run_base, y_gradients

Output = tuple[Tensor, Tensor | None]


class _GateContext(FunctionCtx):
    """What backward finds of its forward."""

    calls: tuple[Call, Call]
    hook: XGrad | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class ClosedGate(torch.autograd.Function):
    """a = silu(gate) up p and s2 = a A2ᵀ, with [gate, up] = y + c1 s1 B1ᵀ and s1 = x A1ᵀ.

    y: of the base. p: a weight of each token. dgrad: dy; dx = ds1 A1, unless a hook adds it to the
    base's; dp. wgrad: dA1, dB1, dA2. No collective.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _GateContext,
        y: Tensor,
        x: Tensor,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        weights: Tensor,
        one: Call,
        two: Call,
        hook: XGrad | None,
    ) -> tuple[Tensor, Tensor]:
        """Return a [n, f] and s2 [n, r] for y [n, 2 f] and x [n, i]."""
        y = y.contiguous()
        s1 = one.ops.shrink(x, a1, one.a_offsets)
        how = (b1, one.scale, a2, one.b_offsets, one.segments, weights)
        a, s2 = one.ops.gate_(y, s1, *how)
        ctx.calls, ctx.hook = (one, two), hook
        ctx.save_for_backward(x, y, s1, a1, b1, a2, weights)
        return a, s2

    @staticmethod
    def backward(ctx: _GateContext, da: Tensor, ds2: Tensor):  # type: ignore[override]
        """Return dy, dx or nothing, those of the factors, and dp."""
        (one, two), hook = ctx.calls, ctx.hook
        x, y, s1, a1, b1, a2, weights = ctx.saved_tensors
        how = (b1, one.scale, a2, one.b_offsets, one.segments, weights)
        dy, ds1, a, d_weights = one.ops.gate_backward_(da, ds2, y, s1, *how)
        d_a1 = a_grad(ds1, x, a1, one)
        d_b1 = b_grad(dy, s1, b1, one.scale, one)
        d_a2 = a_grad(ds2, a, a2, two)
        dx = None
        if hook is not None:
            hook.given = ds1, a1
        elif ctx.needs_input_grad[1]:
            dx = x_grad(None, ds1, x, a1, one)
        d_weights = d_weights if ctx.needs_input_grad[5] else None
        return dy, dx, d_a1, d_b1, d_a2, d_weights, None, None, None


class _ExpandContext(FunctionCtx):
    """What backward finds of its forward."""

    call: Call
    saved_tensors: tuple[Tensor, Tensor]


class ClosedExpand(torch.autograd.Function):
    """z + c s Bᵀ, added in place. dgrad: ds = c dz B. wgrad: dB. No collective."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _ExpandContext, z: Tensor, s: Tensor, lora_B: Tensor, call: Call
    ) -> Tensor:
        """Return z [n, o] for s [n, r]."""
        call.ops.expand_(z, s, lora_B, call.scale, call.b_offsets, call.segments)
        ctx.call = call
        ctx.save_for_backward(s, lora_B)
        # A fresh handle: z may be a view that autograd forbids to change in place.
        return z.detach()

    @staticmethod
    def backward(ctx: _ExpandContext, dz: Tensor):  # type: ignore[override]
        """Pass dz on to the base; give ds and dB."""
        s, lora_B = ctx.saved_tensors
        ds, d_b = y_gradients(dz, s, lora_B, ctx.call, needs_b=True)
        return dz, ds, d_b, None


class _Closed(NamedTuple):
    """Both adapters of one call."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    one: Call
    two: Call


class GroupedForward:
    """The forward of a TEGroupedMLP: by the pass where that is faster, else the module's own."""

    def __init__(self, mlp: TEGroupedMLP, one: GroupedAdapter, two: GroupedAdapter) -> None:
        self._base_forward: Callable[..., Output] = mlp.forward
        self._called = [mlp.linear_fc1, mlp.linear_fc2, one, two]
        self._adapters = one, two
        self._is_faster = Choice(one, two)

    def __call__(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        *buffers: Tensor | None,
        **named_buffers: Tensor | None,
    ) -> Output:
        """Return z [n, o] and no bias for x [n, i], sorted by expert, and p [n]."""
        x, weights = permuted_local_hidden_states, permuted_probs
        if self._is_faster(x) and x.numel() > 0 and takes_weights(weights, x):
            given = (*buffers, *named_buffers.values())
            if not any(buffer is not None for buffer in given) and not has_hooks(self._called):
                splits = tokens_per_expert.tolist()
                if (closed := self._closed(x, splits)) is not None:
                    return self._by_pass(x, splits, weights, closed), None
        return self._base_forward(x, tokens_per_expert, weights, *buffers, **named_buffers)

    def _closed(self, x: Tensor, splits: list[int]) -> _Closed | None:
        """Return both adapters where this call may take the pass."""
        first, second = self._adapters
        ends = on_device(splits, x.device).cumsum(0)
        one, two = first.closed(x, ends), second.closed(x, ends)
        if one is None or two is None:
            return None
        found = _Closed(*one[:2], *two[:2], one[2], two[2])
        return found if all_learn(x, *found[:4]) else None

    def _by_pass(self, x: Tensor, splits: list[int], weights: Tensor, closed: _Closed) -> Tensor:
        first, second = self._adapters
        a1, b1, a2, b2, one, two = closed
        x, y, _, hook = run_base(lambda inner: first.base_forward(inner, splits), x, one)
        a, s2 = apply(ClosedGate, y, x, a1, b1, a2, weights, one, two, hook)
        z, _ = second.base_forward(a, splits)
        return apply(ClosedExpand, z, s2, b2, two)


def bind_grouped(mlp: torch.nn.Module, one: GroupedAdapter, two: GroupedAdapter) -> None:
    """Wrap the forward of grouped experts that are nothing but two GEMMs and SwiGLU between."""
    if one.opens and two.opens and type(mlp) is TEGroupedMLP and _is_plain(mlp):
        mlp.forward = GroupedForward(mlp, one, two)


def _is_plain(mlp: TEGroupedMLP) -> bool:
    config = mlp.config
    asked = ("_with_fused_impl", "activation_recompute", "offload_expert_fc1", "offload_moe_act")
    more = (config.fp8, config.fp4, config.moe_apply_probs_on_input)
    return (
        "forward" not in vars(mlp)
        and is_swiglu(config)
        and getattr(config, "moe_mlp_glu_interleave_size", None) is None
        and not any(more)
        and not any(getattr(mlp, name, False) for name in asked)
    )
