"""torch in place of CUDA kernels of apex and TransformerEngine that runs and tests on the CPU meet.

A GPU has the kernels where it has these packages; where it has not, `megalora.mends` goes without.
"""

import sys
import types
from typing import Any

import torch


def install() -> None:
    """Replace the kernels in Megatron, after the facade is up."""
    _provide_wgrad_kernel()
    _replace_attention()
    _replace_adam()


def _provide_wgrad_kernel() -> None:
    """Provide apex's weight gradient kernel: gradient accumulation fusion is Megatron's default."""
    from megatron.core.tensor_parallel import layers

    kernel: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    kernel.wgrad_gemm_accum_fp32 = kernel.wgrad_gemm_accum_fp16 = _accumulate_wgrad
    sys.modules[kernel.__name__] = kernel
    # What Megatron binds where it finds the module on import.
    patched: Any = layers
    patched.fused_weight_gradient_mlp_cuda = kernel
    patched._grad_accum_fusion_available = True


def _accumulate_wgrad(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_outputᵀ x, in main_grad's precision."""
    wgrad = grad_output.flatten(0, -2).t().to(main_grad.dtype)
    main_grad.addmm_(wgrad, x.flatten(0, -2).to(main_grad.dtype))


def _replace_attention() -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from megalora.mends.attention import CoreAttention

    patched: Any = TESpecProvider
    patched.core_attention = lambda self: CoreAttention


def _replace_adam() -> None:
    """Leave TransformerEngine's Adam, where that is installed: it is a CUDA kernel."""
    from megalora.mends.optimizer import replace_adam

    replace_adam()
