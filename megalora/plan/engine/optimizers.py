"""TransformerEngine's optimizers as shapes: the states that they make in their first step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Fused(torch.optim.Optimizer):
    """An optimizer whose update is one kernel."""

    def __init__(self, params: Iterable[Any], states: dict[str, torch.dtype], **defaults: object):
        super().__init__(params, defaults)
        self._states = states

    def step(self, closure: Callable[[], float] | None = None, **_unused: object) -> None:  # type: ignore[override]
        """Make the states of all parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                has = getattr(parameter, "decoupled_grad", None) is not None
                if has or parameter.grad is not None:
                    self.initialize_state(parameter)

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Make a parameter's states where it has none."""
        state: dict[str, Tensor] = self.state[param]
        for name, dtype in self._states.items():
            if name not in state:
                state[name] = torch.empty_like(param, dtype=dtype)


class FusedAdam(_Fused):
    """Adam: two moments, and fp32 weights where it keeps them itself."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        **_unused: object,
    ) -> None:
        states = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if master_weights:
            # The half of fp32 that bf16 weights have not.
            own = torch.int16 if store_param_remainders else master_weight_dtype
            states["master_param"] = own
        more: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, states, bias_correction=bias_correction, **more)
        self.master_weights = master_weights


class FusedSGD(_Fused):
    """SGD: the momentum, where there is one."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.0, **defaults: Any
    ) -> None:
        states = {"momentum_buffer": torch.float32} if momentum else {}
        super().__init__(params, states, lr=lr, momentum=momentum, **defaults)


def multi_tensor_applier(
    op: Callable[..., Any], noop: Tensor, tensors: list[list[Tensor]], *args: object
) -> Any:
    """Call a kernel over lists of tensors."""
    return op(0, noop, tensors, *args) if tensors[0] else None


def multi_tensor_l2norm(
    _chunk: int, _noop: Tensor, tensors: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors, and that of each where it is asked for."""
    each = len(tensors[0]) if per_tensor else 0
    return torch.empty(1, device="cuda"), torch.empty(each, device="cuda")


def multi_tensor_scale(_chunk: int, _noop: Tensor, tensors: list[list[Tensor]], *_: object) -> None:
    """Scale tensors in place."""


multi_tensor_scale_tensor = multi_tensor_unscale_l2norm = multi_tensor_scale
