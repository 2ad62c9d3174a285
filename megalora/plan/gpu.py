"""What a GPU holds where this machine runs plain torch: kernels of Megatron's and torch's own.

`megalora.plan.engine` has TransformerEngine's. Everything here is in place in a context, in a
process that plans; tensors are on meta.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions import (
    fused_bias_dropout,
    fused_bias_geglu,
    fused_bias_gelu,
    fused_bias_swiglu,
    fused_cross_entropy,
    fused_weighted_squared_relu,
)
from megatron.core.tensor_parallel import random
from megatron.core.transformer import attention, multi_latent_attention, torch_norm
from torch import Tensor

from megalora.mends import attention as own_attention
from megalora.plan.engine import norms, rope
from megalora.plan.engine.attention import ALONE, flash, num_pairs
from megalora.plan.engine.base import stand_in
from megalora.plan.engine.kernels import ops
from megalora.plan.meter import meters

# What Megatron compiles to one kernel each, where torch.compile is no GPU's.
_ONE_KERNEL: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (fused_bias_gelu, ("bias_gelu", "bias_gelu_back")),
    (
        fused_bias_swiglu,
        (
            *("swiglu", "bias_swiglu", "weighted_swiglu"),
            *("swiglu_back", "bias_swiglu_back", "weighted_swiglu_back"),
        ),
    ),
    (
        fused_bias_geglu,
        (
            *("geglu", "bias_geglu", "geglu_back", "bias_geglu_back"),
            *("quick_geglu", "weighted_quick_geglu", "weighted_bias_quick_geglu"),
            *("weighted_quick_geglu_back", "weighted_bias_quick_geglu_back"),
        ),
    ),
    (fused_weighted_squared_relu, ("weighted_squared_relu", "weighted_squared_relu_back")),
    (
        fused_cross_entropy,
        (
            *("calculate_logits_max", "calculate_predicted_logits"),
            *("calculate_cross_entropy_loss", "calculate_gradients"),
        ),
    ),
    (fused_bias_dropout, ("bias_dropout_add_fused_train",)),
    (torch_norm.L2Norm, ("_norm",)),
    (attention.Attention, ("_apply_output_gate",)),
)


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Let layers on meta hold and allocate in this context what they do on a GPU."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _replaced():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _replaced() -> Iterator[tuple[Any, str, object]]:
    for owner, names in _ONE_KERNEL:
        for name in names:
            yield owner, name, one_kernel(getattr(owner, name))
    functional: Any = torch.nn.functional
    yield own_attention, "scaled_dot_product_attention", scaled_dot_product_attention
    yield functional, "dropout", dropout(functional.dropout)
    yield functional, "rms_norm", rms_norm(functional.rms_norm)
    kernel = sys.modules.get("fused_weight_gradient_mlp_cuda")
    if kernel is not None:
        for name in ("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"):
            yield kernel, name, accumulate
    if multi_latent_attention.fused_apply_mla_rope_for_q is not None:
        yield multi_latent_attention, "fused_apply_mla_rope_for_q", rope.in_place
        yield multi_latent_attention, "fused_apply_mla_rope_for_kv", rope.keys_and_values
    yield random, "_get_share_storage", lambda: share_storage
    yield torch.UntypedStorage, "resize_", seen(torch.UntypedStorage.resize_)


def keep_stand_ins(model: Sequence[torch.nn.Module]) -> None:
    """Make what TransformerEngine keeps from a run's first backward on.

    Where a kernel adds a gradient to main_grad, autograd gets a tensor that all weights of a shape
    share.
    """
    if not HAVE_TE:
        return
    fused = ("fuse_wgrad_accumulation", "gradient_accumulation_fusion")
    for module in (module for chunk in model for module in chunk.modules()):
        if any(getattr(module, name, False) for name in fused):
            for weight in module.parameters(recurse=False):
                if weight.requires_grad and weight.dim() == 2:
                    stand_in(weight.shape, weight.dtype)


def one_kernel[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of which only what it returns, or autograd keeps, is in memory."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            for meter in meters():
                stack.enter_context(meter.in_one_kernel())
            return function(*args, **kwargs)

    return run


def seen(
    resize: Callable[..., torch.UntypedStorage],
) -> Callable[..., torch.UntypedStorage]:
    """Let meters see that a storage is let go of, as recomputation does with its outputs."""

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = resize(self, size)
        for meter in meters():
            meter.resized(self)
        return result

    return resize_


def share_storage(output: Tensor, recomputed: Tensor) -> None:
    """Give the memory of what was computed again to the tensor that was let go of."""
    kept, again = output.untyped_storage(), recomputed.untyped_storage()
    size = again.nbytes()
    again.resize_(0)
    kept.resize_(size)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> Tensor:
    """Attend as torch does on a GPU; query: [b, heads, s, d], key and value: [b, groups, s, d].

    A mask is turned into numbers of the queries' type, which are kept.
    """
    pairs = query.shape[0] * num_pairs(query.shape[2], key.shape[2], causal=is_causal)
    kept = () if attn_mask is None else (attn_mask.to(query.device, query.dtype),)
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    return flash(q, k, v, pairs, ALONE, *kept).permute(1, 2, 0, 3)


def dropout(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch's dropout, whose mask has a byte for each element, as on a GPU."""

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if x.device.type != "meta" or inplace or not training or p == 0:
            return original(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    return drop


def rms_norm(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch's RMSNorm, which is one kernel on a GPU."""

    def norm(
        x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if x.device.type != "meta" or weight is None:
            return original(x, shape, weight, eps)
        return norms.norm(x, weight, None)

    return norm


def accumulate(x: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_outputᵀ x, by the kernel that Megatron has of apex."""
    ops.wgrad_(main_grad, grad_output, x)
