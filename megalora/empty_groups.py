"""Optimizers without parameters on some ranks, as experts' on a pipeline stage that has none.

Without the distributed optimizer Megatron 0.19 resumes them wrongly. Rank 0 writes for all ranks
what is not sharded: it has no step count for a group in which it has no parameters, so that Adam
would count anew, and an empty list where others have main parameters. And an optimizer that finds
no states in a checkpoint fails.
"""

from collections.abc import Callable
from typing import Any


def count_steps(optimizer: Any) -> None:
    """Give groups without parameters the number of steps that all others have taken."""
    groups = [
        group
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        # None where a rank has nothing to train.
        if part.optimizer is not None
        for group in part.optimizer.param_groups
    ]
    steps = {group["step"] for group in groups if group["params"] and "step" in group}
    for group in groups:
        if not group["params"] and len(steps) == 1:
            group["step"] = next(iter(steps))


def install() -> None:
    """Let Megatron's optimizers save and load without parameters; not to be called twice."""
    from megatron.core.optimizer.optimizer import (
        Float16OptimizerWithFloat16Params,
        FP32Optimizer,
    )

    kind: Any
    for kind in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        kind.load_state_dict = _method(_load, kind.load_state_dict)
    mixed: Any = Float16OptimizerWithFloat16Params
    mixed.sharded_state_dict = _method(_sharded_state_dict, mixed.sharded_state_dict)


def _method(wrapper: Callable[..., Any], original: Any) -> Any:
    return lambda self, *args, **kwargs: wrapper(self, original, *args, **kwargs)


def _sharded_state_dict(
    self: Any, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    state = original(self, *args, **kwargs)
    if not any(state["fp32_from_fp16_params"]):
        del state["fp32_from_fp16_params"]
    return state


def _load(self: Any, original: Callable[..., None], state_dict: dict[str, Any]) -> None:
    # What is empty in the checkpoint is left out of what is read.
    state_dict.get("optimizer", state_dict).setdefault("state", {})
    if "optimizer" in state_dict:
        state_dict.setdefault("fp32_from_fp16_params", [])
    original(self, state_dict)
