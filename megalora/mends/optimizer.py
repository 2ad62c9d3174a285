"""Adam as apex and TransformerEngine lay it out, and one loss scale for all parts of a model."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer

from megalora.replace import Patch, instead

# The multi-tensor functions that torch.optim itself is made of; they have no public name.
_torch: Any = torch


def scaled_together(prepare: Callable[..., bool]) -> Callable[..., bool]:
    """Return ChainedOptimizer.prepare_grads with the same loss scale in every part of the chain.

    Losses are scaled by the first part's. Megatron changes only that of the part that overflowed,
    as experts do without dense layers, and each part then divides by its own.
    """

    @functools.wraps(prepare)
    def prepare_grads(self: optimizer.ChainedOptimizer) -> bool:
        parts = [getattr(part, "grad_scaler", None) for part in self.chained_optimizers]
        scalers = [scaler for scaler in parts if scaler is not None]
        before = [scaler.state_dict() for scaler in scalers]
        found_inf = prepare(self)
        for scaler, state in zip(scalers, before, strict=True):
            scaler.load_state_dict(state)
            scaler.update(found_inf)
        return found_inf

    return prepare_grads


class FusedAdam(torch.optim.Optimizer):
    """Do Adam or AdamW with the number of steps in each parameter group.

    torch's own Adam keeps a step for each parameter, which Megatron's distributed optimizer cannot
    save and load. The update is that of apex's FusedAdam: m and v in the parameter's type,
    p -= lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps), each group with its own lr and eps.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "optimizer_cuda_graph True needs TransformerEngine's or apex's FusedAdam, which "
                "counts its steps on the GPU: leave out --optimizer-cuda-graph"
            )
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


_WHY = "torch's AdamW counts steps by parameter, which the distributed optimizer cannot save"
# Where no other package has the kernel; on the CPU always.
ADAM = (
    *(
        Patch(module, "Adam", ("params", "lr"), instead(FusedAdam), _WHY)
        for module in (optimizer, distrib_optimizer)
    ),
    Patch(optimizer, "USING_PYTORCH_OPTIMIZER", None, instead(False), "what `Adam` is"),
    *(
        Patch(distrib_optimizer, name, None, instead(True), "what `Adam` is")
        for name in ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER")
        if not distrib_optimizer.HAVE_APEX_OR_TE
    ),
)
PATCHES = (
    Patch(
        optimizer.ChainedOptimizer,
        "prepare_grads",
        ("self",),
        scaled_together,
        "after an overflow each part of a chain divides by a loss scale of its own",
    ),
    *(ADAM if optimizer.USING_PYTORCH_OPTIMIZER else ()),
)
