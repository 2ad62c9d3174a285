"""apex's weight gradient kernel: gradient accumulation fusion is a default of Megatron's flags."""

import sys
import types

import torch


def install() -> None:
    """Let Megatron find torch in place of the kernel's module, when it is imported.

    A GPU has the kernel where it has apex; where it has not, `megalora.mends` goes without.
    """
    kernel = types.ModuleType("fused_weight_gradient_mlp_cuda")
    vars(kernel).update(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    sys.modules[kernel.__name__] = kernel


def accumulate(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_outputᵀ x, in main_grad's precision."""
    wgrad = grad_output.flatten(0, -2).t().to(main_grad.dtype)
    main_grad.addmm_(wgrad, x.flatten(0, -2).to(main_grad.dtype))
