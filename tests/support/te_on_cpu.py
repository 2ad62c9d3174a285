"""TransformerEngine's real Python layers on the CPU: torch stands in for its C++ kernels.

Only what LoRA's tests call: GEMM, grouped GEMM, the norms, the workspace, and the check that
tensors are on a GPU. Install it (no GPU needed) as docs/install.md says.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _EverythingIsOnTheGPU(TorchFunctionMode):
    """Answer True where TransformerEngine asks a tensor whether it is on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__self__", None) is torch.Tensor.is_cuda:
            return True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernels_of_torch() -> Iterator[None]:
    """Run TransformerEngine's layers on CPU tensors inside this context."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.utils as utils
    import transformer_engine.pytorch.cpp_extensions as extensions
    import transformer_engine.pytorch.cpp_extensions.gemm as gemm_module
    import transformer_engine.pytorch.ops.basic.layer_norm as layernorm_module
    import transformer_engine.pytorch.ops.basic.rmsnorm as rmsnorm_module
    import transformer_engine_torch as tex

    with contextlib.ExitStack() as stack:
        for module in (tex, extensions, rmsnorm_module):
            stack.enter_context(mock.patch.object(module, "rmsnorm_fwd", _rmsnorm_forward))
            stack.enter_context(mock.patch.object(module, "rmsnorm_bwd", _rmsnorm_backward))
        for module in (tex, extensions, layernorm_module):
            stack.enter_context(mock.patch.object(module, "layernorm_fwd", _layernorm_forward))
            stack.enter_context(mock.patch.object(module, "layernorm_bwd", _layernorm_backward))
        stack.enter_context(mock.patch.object(tex, "generic_gemm", _gemm))
        stack.enter_context(mock.patch.object(tex, "te_general_grouped_gemm", _grouped_gemm))
        stack.enter_context(mock.patch.object(gemm_module, "get_cublas_workspace", _workspace))
        for module, name, answer in (
            (gemm_module, "get_sm_count", 1),
            (torch.cuda, "is_current_stream_capturing", False),
            (torch.cuda, "is_available", True),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=answer))
        for name, function in (
            ("multi_tensor_applier", utils.local_multi_tensor_applier),
            ("l2_norm_impl", utils.local_multi_tensor_l2_norm),
            ("multi_tensor_scale_impl", utils.local_multi_tensor_scale),
            ("multi_tensor_scale_tensor_impl", None),
        ):
            # What Megatron clips gradients by where TransformerEngine is missing.
            stack.enter_context(mock.patch.object(clip_grads, name, function))
        stack.enter_context(_EverythingIsOnTheGPU())
        yield


def _workspace(device: Any, ub: bool, grouped_gemm: bool) -> Any:
    empty = torch.empty(1, dtype=torch.uint8)
    return [empty] if grouped_gemm else empty


def _dtypes() -> dict[Any, torch.dtype]:
    from transformer_engine.pytorch.constants import TE_DType

    return {te: torch_dtype for torch_dtype, te in TE_DType.items()}


def _product(left: Tensor, transpose_left: bool, right: Tensor, transpose_right: bool) -> Tensor:
    """Return op(right) op(left): cuBLAS multiplies column-major."""
    a, b = (t.reshape(-1, t.shape[-1]).float() for t in (left, right))
    return (b.t() if transpose_right else b) @ (a.t() if transpose_left else a)


def _gemm(
    left: Tensor,
    transpose_left: bool,
    right: Tensor,
    transpose_right: bool,
    out: Tensor | None,
    _quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    _bias_dtype: Any,
    gelu: bool,
    _gelu_in: Any,
    grad: bool,
    _workspace: Any,
    _workspace_size: int,
    accumulate: bool,
    _split_accumulator: bool,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, None, Any]:
    assert not gelu
    assert kwargs["alpha"] == 1.0
    result = _product(left, transpose_left, right, transpose_right)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = right.reshape(-1, right.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is None:
        dtype = left.dtype if out_dtype is None else _dtypes()[out_dtype]
        rows = (right.shape[-1],) if transpose_right else right.shape[:-1]
        out = result.to(dtype).reshape(*rows, result.shape[-1])
    else:
        out.copy_(result.view(out.shape) + (out.float() if accumulate else 0.0))
    return out, bias_gradient, None, kwargs.get("extra_output")


def _grouped_gemm(
    left: list[Tensor],
    transpose_left: bool,
    right: list[Tensor],
    transpose_right: bool,
    out: list[Tensor],
    _out_dtype: Any,
    m_splits: list[int],
    bias: list[Tensor],
    _bias_dtype: Any,
    single_output: bool,
    _gelu_in: Any,
    grad: bool,
    _workspaces: Any,
    _workspace_size: int,
    accumulate: bool,
    *_rest: Any,
) -> list[Tensor]:
    assert not (grad and any(b.numel() for b in bias)), "no gradients of biases in these tests"
    outs = out[0].split(m_splits) if single_output else out
    for a, b, added, target in zip(left, right, bias, outs, strict=True):
        result = _product(a, transpose_left, b, transpose_right)
        result = result + (added.float() if added.numel() else 0.0)
        target.copy_(result + (target.float() if accumulate else 0.0))
    return bias


def _rmsnorm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    _quantizer: Any,
    _dtype: Any,
    _margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    rsigma = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = x.float() * rsigma[:, None] * (weight.float() + float(zero_centered))
    if out is None:
        return y.to(x.dtype), None, rsigma
    return out.copy_(y), None, rsigma


def _rmsnorm_backward(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    normed = x.float() * rsigma[:, None]
    scaled = dy.float() * (weight.float() + float(zero_centered))
    dx = rsigma[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


def _layernorm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mu = x.float().mean(-1)
    y, _, rsigma = _rmsnorm_forward(x.float() - mu[:, None], weight, eps, *rest)
    return (y + bias.float()).to(x.dtype), mu, rsigma


def _layernorm_backward(
    dy: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_weight = _rmsnorm_backward(dy, x.float() - mu[:, None], rsigma, weight, *rest)
    dx = dx - dx.mean(-1, keepdim=True)
    return dx.to(x.dtype), d_weight, dy.float().sum(0).to(weight.dtype)
