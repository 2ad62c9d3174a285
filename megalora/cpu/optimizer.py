"""Adam as apex and TransformerEngine lay it out."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

# The multi-tensor functions that torch.optim itself is made of; they have no public name.
_torch: Any = torch


class FusedAdam(torch.optim.Optimizer):
    """Do Adam or AdamW with the number of steps in each parameter group.

    torch's own Adam keeps a step for each parameter, which Megatron's distributed optimizer cannot
    save and load. The update is that of apex's FusedAdam: m and v in the parameter's type,
    p -= lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps), each group with its own lr and eps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        """Update every parameter that has a gradient; an empty group does not count a step."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        exp_avg = [state["exp_avg"] for state in states]
        exp_avg_sq = [state["exp_avg_sq"] for state in states]
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        if decay and self.adam_w_mode:
            _torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = _torch._foreach_add(grads, params, alpha=decay)
        _torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        _torch._foreach_mul_(exp_avg_sq, beta2)
        _torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
        denominator = _torch._foreach_div(exp_avg_sq, 1 - beta2 ** group["step"])
        _torch._foreach_sqrt_(denominator)
        _torch._foreach_add_(denominator, group["eps"])
        _torch._foreach_addcdiv_(params, exp_avg, denominator, -lr / (1 - beta1 ** group["step"]))
