"""What LoRA on one linear is compared with: the peers that are installed, and their ways in torch.

On one rank Megatron-Bridge's adapter is eager LoRA. Unsloth's module cannot be imported without its
own model loading, so its way is written here.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from _timing import Variant
from torch import Tensor, nn

Lora = tuple[Tensor, Tensor, Tensor]  # weight, lora_A, lora_B


class AddmmLinear(torch.autograd.Function):
    """LoRA by BLAS calls with beta = 1: no copy of x or y, no fused kernel, no dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float):
        """Return x Wᵀ + scale * x Aᵀ Bᵀ."""
        s = x @ lora_A.T
        y = (x @ weight.T).addmm_(s, lora_B.T, alpha=scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        """dgrad: dx = dy W + ds A. wgrad: dA = dsᵀ x, dB = scale * dyᵀ s."""
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        ds = ctx.scale * (dy @ lora_B)
        dx = (dy @ weight).addmm_(ds, lora_A)
        return dx, None, ds.T @ x, ctx.scale * (dy.T @ s), None


class RecomputingLinear(torch.autograd.Function):
    """LoRA as Unsloth does it: beta = 1, x Aᵀ computed again in backward, dy B computed twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float):
        """Return x Wᵀ + scale * x Aᵀ Bᵀ."""
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scale = scale
        return (x @ weight.T).addmm_(x @ lora_A.T, lora_B.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        """dgrad: dx = dy W + (dy B) A. wgrad: dA = (dy B)ᵀ x, dB = dyᵀ (x Aᵀ)."""
        x, weight, lora_A, lora_B = ctx.saved_tensors
        d_a = ctx.scale * ((dy @ lora_B).T @ x)
        d_b = ctx.scale * (dy.T @ (x @ lora_A.T))
        dx = (dy @ weight).addmm_(dy @ lora_B, lora_A, alpha=ctx.scale)
        return dx, None, d_a, d_b, None


class LowRankFirst(torch.autograd.Function):
    """LoRA written first, the base added by a GEMM with beta = 1, whose epilogue reads it.

    One pass over y less than adding to the base's result, and over dX likewise. side: a stream for
    the gradients of both factors beside the base's dgrad, None for one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, side: Any
    ):
        """Return scale * x Aᵀ Bᵀ + x Wᵀ."""
        s = x @ lora_A.T
        y = s @ (scale * lora_B).T
        ctx.save_for_backward(x, weight, lora_A, lora_B, s)
        ctx.scale, ctx.side = scale, side
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        """dgrad: dx = ds A + dy W. wgrad: dA = dsᵀ x, dB = scale * dyᵀ s."""
        x, weight, lora_A, lora_B, s = ctx.saved_tensors
        ds = dy @ (ctx.scale * lora_B)
        if ctx.side is None:
            dx = (ds @ lora_A).addmm_(dy, weight)
            return dx, None, ds.T @ x, ctx.scale * (dy.T @ s), None, None
        ctx.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(ctx.side):
            d_a, d_b = ds.T @ x, ctx.scale * (dy.T @ s)
        dx = (ds @ lora_A).addmm_(dy, weight)
        torch.cuda.current_stream().wait_stream(ctx.side)
        for tensor in (x, dy, s, ds):
            tensor.record_stream(ctx.side)
        for tensor in (d_a, d_b):
            tensor.record_stream(torch.cuda.current_stream())
        return dx, None, d_a, d_b, None, None


def peers(lora: Lora, *, scale: float, alpha: float, p: float) -> tuple[list[Variant], list[str]]:
    """Return the peers that can run here, and why each of the others cannot."""
    weight, lora_A, lora_B = lora
    found, absent = [], []

    def add(name: str, make: Callable[[], Variant]) -> None:
        try:
            found.append(make())
        # A peer may fail on import in its own ways, with another version of Triton for one.
        except Exception as error:
            absent.append(f"{name}: {error}")

    add("PEFT layer", lambda: _peft(weight, lora_A.shape[0], alpha, p))
    add("LoRAFusion", lambda: _lorafusion(lora, scale, p))
    if p == 0.0:
        for name, function in (("addmm", AddmmLinear), ("as Unsloth", RecomputingLinear)):

            def forward(x: Tensor, function: Any = function) -> Tensor:
                return function.apply(x, weight, lora_A, lora_B, scale)

            found.append(Variant(name, forward, [lora_A, lora_B], [weight]))
        sides = {"low rank first": None}
        if weight.is_cuda:
            sides["low rank first, 2 streams"] = torch.cuda.Stream()
        for name, side in sides.items():

            def first(x: Tensor, side: Any = side) -> Tensor:
                return LowRankFirst.apply(x, weight, lora_A, lora_B, scale, side)

            found.append(Variant(name, first, [lora_A, lora_B], [weight]))
    return found, absent


def _peft(weight: Tensor, rank: int, alpha: float, p: float) -> Variant:
    from peft import LoraConfig, get_peft_model

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=p, target_modules=["0"])  # type: ignore[arg-type]
    model = get_peft_model(nn.Sequential(base), config)  # type: ignore[arg-type]
    layer = model.get_submodule("base_model.model.0").to(weight.dtype)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return Variant("PEFT layer", layer, trained, [weight])


def _lorafusion(lora: Lora, scale: float, p: float) -> Variant:
    """Source: github.com/CentML/lorafusion, which reads x as [batch, sequence, in]."""
    if importlib.util.find_spec("lorafusion") is None:
        raise ImportError("not installed")
    import triton.language as tl

    for name in ("load", "store"):
        # Newer Triton lacks these names, which it binds on import and this class does not use.
        if not hasattr(tl, f"_experimental_descriptor_{name}"):
            setattr(tl, f"_experimental_descriptor_{name}", None)
    from lorafusion.ops.lora_v1 import FusedLinearLoRA  # type: ignore[import-not-found]

    weight, lora_A, lora_B = lora

    def forward(x: Tensor) -> Tensor:
        return FusedLinearLoRA.apply(x[None], weight, lora_A, lora_B, scale, p, 1, None)[0]

    return Variant("LoRAFusion", forward, [lora_A, lora_B], [weight])
