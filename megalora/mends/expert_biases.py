"""Biases of experts: added once where ranks share out an expert, and before its numbers are cut."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.transformer import mlp
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megalora.replace import Patch, around

type Experts = SequentialMLP | TEGroupedMLP
type Biases = Tensor | list[Tensor] | None


class _Share(torch.autograd.Function):
    """A part of a bias [h], of which as many ranks as there are parts add one each.

    forward: bias / parts. wgrad: the whole gradient, which all these ranks have. No collective.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, bias: Tensor, parts: int) -> Tensor:  # type: ignore[override]
        """Return the part."""
        return bias / parts

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the gradient as it is."""
        return grad, None


def prepare_biases(
    build: Callable[..., None], self: Experts, *args: object, **kwargs: object
) -> None:
    """Build experts, and let their callers add each bias once, to a tensor that may be changed."""
    build(self, *args, **kwargs)
    if not self.config.add_bias_linear:
        return
    called_alone = isinstance(self, SequentialMLP)
    hook = functools.partial(_prepare, get_pg_size(self.tp_group), called_alone)
    for one in self.local_experts if called_alone else [self]:
        cast(Any, one).linear_fc2.register_forward_hook(hook)


def _prepare(
    parts: int, called_alone: bool, _linear: object, _inputs: object, result: tuple[Tensor, Biases]
) -> tuple[Tensor, Biases]:
    """Return y and this rank's part of the bias, or of each expert's.

    The caller of one expert adds its bias in place, which autograd forbids of what a custom
    function has passed on as it was: a reduction over one rank, or an adapter.
    """
    y, bias = result
    if called_alone and y.requires_grad:
        y = y.clone()
    if parts == 1 or bias is None:
        return y, bias
    return y, [_share(one, parts) for one in bias] if isinstance(bias, list) else _share(
        bias, parts
    )


def _share(bias: Tensor, parts: int) -> Tensor:
    return _Share.apply(bias, parts)  # type: ignore[return-value]


def let_experts_be_shared_out(
    check: Callable[[TransformerConfig], None], self: TransformerConfig
) -> None:
    """Check a configuration of experts that have biases and whose weights ranks share out.

    Megatron refuses it, since each of these ranks would add the whole bias.
    """
    parts = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
    # Its other checks of biases are left to it.
    asked_more = (
        self.experimental_attention_variant == "dsa"
        or self.moe_single_grouped_bias
        or (self.bias_activation_fusion and not self.gated_linear_unit)
        or self.transformer_impl == "inference_optimized"
    )
    if not self.num_moe_experts or not self.add_bias_linear or parts == 1 or asked_more:
        return check(self)
    self.add_bias_linear = False
    try:
        check(self)
    finally:
        self.add_bias_linear = True


def add_bias_first(
    activate: Callable[..., Tensor],
    input: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    fp8_input_store: bool = False,
    linear_offset: float = 0.0,
    clamp_value: float | None = None,
) -> Tensor:
    """Add the bias before numbers are clamped, as the layers do that are not fused."""
    if bias is not None:
        input, bias = input + bias, None
    return activate(input, bias, weights, fp8_input_store, linear_offset, clamp_value)


PATCHES = (
    Patch(
        TransformerConfig,
        "__post_init__",
        ("self",),
        around(let_experts_be_shared_out),
        "biases of experts are refused with expert tensor parallelism",
    ),
    *(
        Patch(
            experts,
            "__init__",
            ("num_local_experts", "config", "submodules", "pg_collection"),
            around(prepare_biases),
            "each rank that shares an expert adds its whole bias, and in place",
        )
        for experts in (SequentialMLP, TEGroupedMLP)
    ),
    Patch(
        mlp,
        "weighted_bias_quick_geglu_impl",
        ("input", "bias", "weights", "fp8_input_store", "linear_offset", "clamp_value"),
        around(add_bias_first),
        "with fused activations experts clamp before they add their bias",
    ),
)
