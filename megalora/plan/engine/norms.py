"""TransformerEngine's layer norms as shapes: they keep their input and a number of each token."""

from typing import Any

import torch
from torch import Tensor

from megalora.plan.engine.base import Device, Kept


def normalize(x: Tensor, *, has_mean: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and in fp32 what backward needs of each token: 1/sigma, and the mean."""
    rows = x.numel() // x.shape[-1]
    statistics = [x.new_empty(rows, dtype=torch.float32) for _ in range(1 + has_mean)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics


class _Norm(torch.autograd.Function):
    """y = norm(x)."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:  # type: ignore[override]
        # The kernel reads rows that lie one after another: of a part of a product, a copy.
        x = x.contiguous()
        y, statistics = normalize(x, has_mean=beta is not None)
        ctx.save_for_backward(x, gamma, beta, *statistics)  # type: ignore[arg-type]
        return y

    @staticmethod
    def backward(ctx: Kept, dy: Tensor):  # type: ignore[override]
        x, gamma, beta, *_ = ctx.saved_tensors
        d_beta = None if beta is None else torch.empty_like(beta)
        return torch.empty_like(x), torch.empty_like(gamma), d_beta


def norm(x: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """Return the output of a layer norm, one of RMS where there is no beta."""
    return _Norm.apply(x, gamma, beta)  # type: ignore[return-value]


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight."""

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: Device = "cuda",
        **_unused: object,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self._add("weight", normalized_shape, params_dtype, device, sequence_parallel)

    def _add(
        self,
        name: str,
        shape: int | tuple[int, ...],
        dtype: torch.dtype | None,
        device: Device,
        tokens: bool | None,
    ) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter(name, parameter)
        if tokens is not None:
            setattr(parameter, "sequence_parallel", tokens)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, as large as x."""
        weight: Any = self.weight
        return norm(x, weight, getattr(self, "bias", None))


class LayerNorm(RMSNorm):
    """y = (x - mean(x)) / sigma(x) * weight + bias."""

    def __init__(self, normalized_shape: int | tuple[int, ...], *args: Any, **how: Any) -> None:
        super().__init__(normalized_shape, *args, **how)
        weight = self.get_parameter("weight")
        tokens = getattr(weight, "sequence_parallel", None)
        self._add("bias", normalized_shape, weight.dtype, weight.device, tokens)
