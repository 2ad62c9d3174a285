"""LoRA inside a gated MLP both of whose linears open: one op and one autograd node each way.

What the low-rank terms do to the wide tensors happens in the activation's own pass over them.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.call import Call, deliver, main_grad_of
from megalora.adapters.collectives import done
from megalora.adapters.experts import GroupedAdapter, SequentialAdapter
from megalora.adapters.gated_experts import bind_grouped
from megalora.adapters.gating import Choice, all_learn, has_hooks, is_swiglu, takes_weights
from megalora.adapters.linear import LinearAdapter
from megalora.adapters.node import apply
from megalora.adapters.one_gemm import biases
from megalora.adapters.opened import Opened
from megalora.targets import ADAPTER_SUFFIX

_LINEARS = ("linear_fc1", "linear_fc2")
# The weight, A, B and call of a linear for x, None where its base stays closed.
Opening = Callable[[Tensor], Opened | None]


class _Context(FunctionCtx):
    """What backward finds of its forward."""

    calls: tuple[Call, Call]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class OpenedGatedMLP(torch.autograd.Function):
    """z = a W2ᵀ + s2 B2ᵀ of a = silu(gate) up p, with [gate, up] = x W1ᵀ + s1 B1ᵀ.

    s1 = c1 x A1ᵀ, s2 = c2 a A2ᵀ. p: a weight of each token, or none. W1 and W2 are frozen.
    dgrad: dx and dp. wgrad: dA1, dB1, dA2 and dB2. No collective.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: _Context,
        x: Tensor,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        weights: Tensor | None,
        w1: Tensor,
        w2: Tensor,
        one: Call,
        two: Call,
    ) -> Tensor:
        """Return z [..., o] for x [..., i] and weights [n]."""
        how = (w1, a1, b1, one.scale, w2, a2, b2, two.scale, one.segments, weights)
        z, y, s1, s2 = one.ops.gated_mlp(x, *how)
        ctx.calls = one, two
        given = () if weights is None else (weights,)
        ctx.save_for_backward(x, y, s1, s2, w1, a1, b1, w2, a2, b2, *given)
        return z

    @staticmethod
    def backward(ctx: _Context, dz: Tensor):  # type: ignore[override]
        """Return dx, those of the factors, and dp."""
        one, two = ctx.calls
        x, y, s1, s2, w1, a1, b1, w2, a2, b2, *rest = ctx.saved_tensors
        weights = rest[0] if rest else None
        given = (dz, x, y, s1, s2, w1, a1, b1, one.scale, w2, a2, b2, two.scale, one.segments)
        params = (one.a_param, one.b_param, two.a_param, two.b_param)
        pa1, pb1, pa2, pb2 = params
        if pa1 is None or pb1 is None or pa2 is None or pb2 is None:
            dx, *found, d_weights = one.ops.gated_mlp_backward(*given, weights)
            made = [done(gradient) for gradient in found]
        else:
            first = main_grad_of(pa1, a1.shape), main_grad_of(pb1, b1.shape)
            second = main_grad_of(pa2, a2.shape), main_grad_of(pb2, b2.shape)
            dx, d_weights = one.ops.gated_mlp_backward_(*first, *second, *given, weights)
            made = [None] * 4
        gradients = [
            deliver(gradient, param, factor.shape)
            for gradient, param, factor in zip(made, params, (a1, b1, a2, b2), strict=True)
        ]
        d_weights = d_weights if ctx.needs_input_grad[5] else None
        return dx, *gradients, d_weights, None, None, None, None


def bind_gated(chunk: torch.nn.Module) -> None:
    """Wrap the forward of every gated MLP whose linears both have adapters that may open them."""
    for module in chunk.modules():
        one, two = (getattr(module, name + ADAPTER_SUFFIX, None) for name in _LINEARS)
        if isinstance(one, SequentialAdapter) and isinstance(two, SequentialAdapter):
            assert isinstance(module, SequentialMLP)
            for index, mlp in enumerate(module.local_experts):
                openings = (functools.partial(a.opened, index) for a in (one, two))
                _bind(mlp, [one, two], *openings)
        elif isinstance(one, GroupedAdapter) and isinstance(two, GroupedAdapter):
            bind_grouped(module, one, two)
        elif type(one) is LinearAdapter and type(two) is LinearAdapter:
            _bind(module, [one, two], one.opened, two.opened)


def _bind(mlp: torch.nn.Module, adapters: list[LoRAAdapter], one: Opening, two: Opening) -> None:
    opens = all(adapter.opens for adapter in adapters)
    if opens and type(mlp) is MLP and _is_gated(mlp):
        # Who has hooks must be called: Megatron gathers parameters in them.
        called = [mlp.linear_fc1, mlp.linear_fc2, *adapters]
        mlp.forward = _GatedForward(mlp.forward, called, Choice(*adapters), one, two)


def _is_gated(mlp: MLP) -> bool:
    """Say whether an MLP is silu(gate) up between two products: what holds for all its calls."""
    return (
        "forward" not in vars(mlp)
        and mlp.activation_func is F.silu
        and is_swiglu(mlp.config)
        and all(biases(getattr(mlp, name)) == (None, None) for name in _LINEARS)
    )


class _GatedForward:
    """The forward of a gated MLP: one node where that is faster and a call opens both linears.

    Any other call is the MLP's own.
    """

    def __init__(
        self,
        base_forward: Callable[..., tuple[Tensor, Tensor | None]],
        called: list[torch.nn.Module],
        is_faster: Choice,
        one: Opening,
        two: Opening,
    ) -> None:
        self._base_forward = base_forward
        self._called = called
        self._openings = one, two
        self._is_faster = is_faster

    def __call__(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """Return z, and no bias by the one node.

        kwargs: what layers give to every kind of MLP, and this kind ignores.
        """
        x, weights = hidden_states, per_token_scale
        openings = self._open(x, weights)
        if openings is None:
            return self._base_forward(x, weights, **kwargs)
        (w1, a1, b1, call1), (w2, a2, b2, call2) = openings
        z = apply(OpenedGatedMLP, x, a1, b1, a2, b2, weights, w1, w2, call1, call2)
        return z, None

    def _open(self, x: Tensor, weights: Tensor | None) -> tuple[Opened, Opened] | None:
        if not self._is_faster(x) or x.numel() == 0 or not takes_weights(weights, x):
            return None
        one, two = self._openings
        if has_hooks(self._called) or (first := one(x)) is None or (second := two(x)) is None:
            return None
        factors = (first.lora_A, first.lora_B, second.lora_A, second.lora_B)
        return (first, second) if all_learn(x, *factors) else None
