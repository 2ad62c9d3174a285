"""When a base linear is nothing but the product with its weight, so that an adapter may open it."""

import sys
from typing import Any, Protocol

import torch
from megatron.core import ModelParallelConfig
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megalora.adapters.autocast import is_autocast
from megalora.adapters.bases import GROUPED_LINEARS, LAYERNORM_LINEARS, PLAIN_LINEARS

# What a configuration may ask of a linear beside its product.
_MORE = (
    "cpu_offloading",
    "defer_embedding_wgrad_compute",
    "delay_wgrad_compute",
    "fine_grained_activation_offloading",
    "tp_comm_overlap",
)
_PLAIN = (Tensor, torch.nn.Parameter)
_LINEARS = (*PLAIN_LINEARS, *LAYERNORM_LINEARS)


class Linear(Protocol):
    """What `PLAIN_LINEARS` have: weight [o, i], None where calls are given it, and bias [o]."""

    config: ModelParallelConfig
    weight: Tensor | None
    bias: Tensor | None


class NormedLinear(Linear, Protocol):
    """What `LAYERNORM_LINEARS` have beside: the norm's weight [i], and its bias [i] or None."""

    config: TransformerConfig
    layer_norm_weight: torch.nn.Parameter
    layer_norm_bias: torch.nn.Parameter | None


class GroupedLinear(Protocol):
    """What `GROUPED_LINEARS` have, beside weight0 and so on, one of each expert."""

    config: ModelParallelConfig
    use_bias: bool


def is_one_gemm(linear: Linear) -> bool:
    """Say whether a linear on one rank is its product and its bias: what holds for all its calls.

    linear: a base, before an adapter wraps its forward, with or without a layer norm before it.
    """
    # NOTE: on Hopper an opened linear is one launch, which starts when the whole GPU is free. A
    # receive of a pipeline, posted ahead, holds a part of it until a peer sends, which may wait for
    # that launch.
    alone = linear.config.pipeline_model_parallel_size == 1
    return alone and type(linear) in _LINEARS and _asks_no_more(linear)


def is_one_grouped_gemm(linear: GroupedLinear) -> bool:
    """Say whether a grouped linear on one rank is its experts' products: what holds for all calls.

    linear: a base, before an adapter wraps its forward.
    """
    kinds = type(linear) in GROUPED_LINEARS
    return kinds and not linear.use_bias and hasattr(linear, "weight0") and _asks_no_more(linear)


def open_weights(weights: list[Tensor], x: Tensor) -> bool:
    """Say whether this call of a linear that `is_one_grouped_gemm` is x Wᵀ of every expert."""
    frozen = all(_is_frozen(weight, x.dtype) for weight in (weights[0], weights[-1]))
    return frozen and _computes_as_given(x)


def _asks_no_more(linear: Linear | GroupedLinear) -> bool:
    if "forward" in vars(linear):
        return False
    # TransformerEngine's inspection of tensors, which is asked for before a model is built.
    inspection = sys.modules.get("nvdlfw_inspect.api")
    return (
        not any(getattr(linear.config, asked, False) for asked in _MORE)
        and getattr(linear, "gtp_remat_size", 1) == 1
        and getattr(linear, "te_quant_params", None) is None
        and getattr(inspection, "DEBUG_MANAGER", None) is None
    )


def open_weight(linear: Linear, x: Tensor, weight: Tensor | None = None) -> Tensor | None:
    """Return W [o, i] where this call of a linear that `is_one_gemm` is x Wᵀ + bias, None if not.

    weight: what the call is given in place of the linear's own. It is not where the weight or the
    bias is trained, where one of them has another dtype than x, under autocast and in FP8.
    """
    if weight is None:
        weight = linear.weight
    bias = linear.bias
    opens = (
        _is_frozen(weight, x.dtype)
        and (bias is None or _is_frozen(bias, x.dtype))
        and _computes_as_given(x)
    )
    return weight if opens else None


def open_behind_norm(linear: NormedLinear, x: Tensor) -> Tensor | None:
    """Return W as `open_weight` does, for a linear that gives its product to norm(x).

    It does not where the norm is trained, or has another dtype than x.
    """
    weight, bias = linear.layer_norm_weight, linear.layer_norm_bias
    frozen = _is_frozen(weight, x.dtype) and (bias is None or _is_frozen(bias, x.dtype))
    return open_weight(linear, x) if frozen else None


def norm_of(linear: NormedLinear) -> torch.nn.Module:
    """Return the layer norm before a linear, by itself: it has the linear's own parameters."""
    config = linear.config
    norm: Any = te.TENorm(config, linear.layer_norm_weight.numel(), config.layernorm_epsilon)
    norm.weight = linear.layer_norm_weight
    if linear.layer_norm_bias is not None:
        norm.bias = linear.layer_norm_bias
    return norm


def is_norm_of(norm: torch.nn.Module, linear: NormedLinear) -> bool:
    """Say whether a layer norm has a linear's own parameters, not those that it had before."""
    weight, bias = linear.layer_norm_weight, linear.layer_norm_bias
    return norm.weight is weight and getattr(norm, "bias", None) is bias


def biases(linear: Linear) -> tuple[Tensor | None, Tensor | None]:
    """Return the bias that a linear adds to y and the one that it leaves to its caller."""
    bias = linear.bias
    # Without a bias, TransformerEngine's linears have an empty one.
    if bias is None or bias.numel() == 0:
        return None, None
    left = getattr(linear, "skip_bias_add", False) or getattr(linear, "te_return_bias", False)
    return (None, bias) if left else (bias, None)


def _is_frozen(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Say whether a tensor is a plain one of a dtype, not quantized or sharded, and not trained."""
    if tensor is None or type(tensor) not in _PLAIN:
        return False
    return tensor.dtype == dtype and not tensor.requires_grad


def _computes_as_given(x: Tensor) -> bool:
    """Say whether a linear computes here in the dtype of x, which is a plain tensor."""
    return type(x) in _PLAIN and not is_autocast(x) and not (te.HAVE_TE and _quantizes())


def _quantizes() -> bool:
    """Say whether TransformerEngine's linears compute in FP8 or less here, or calibrate for it."""
    quantization = te.FP8GlobalStateManager
    return quantization.is_fp8_enabled() or quantization.is_fp8_calibration()
