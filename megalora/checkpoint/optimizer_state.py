"""What Megatron's optimizers keep in a checkpoint, where not every rank trains something.

Rank 0 writes for all ranks what is not sharded: the parameter groups, with the number of steps that
Adam has taken. Megatron 0.19 takes the steps that rank 0 counts, of which a rank without parameters
has none: Adam would start anew, with the moments of its past. It cannot save an optimizer without
any parameters in the whole model (the dense one, where experts alone have adapters), nor load where
this rank's states are none. And it finds a group again by its rates, so that a run cannot change
them, and takes groups that differ in epsilon for each other: here groups keep their order, their
rates and epsilons are this run's, and the checkpoint gives moments and steps.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from megalora.adapters.world import largest
from megalora.checkpoint.schedule import say_changed

Groups = list[dict[str, Any]]
# Of a rank that has nothing that counts them.
_NO_STEPS = -1


def complete(optimizer: MegatronOptimizer) -> None:
    """Give an optimizer all that a checkpoint of it must hold; all ranks must call it.

    Groups without parameters on this rank get the steps that others have taken. Moments that no
    step has made, because the loss scale was too large for each, become zeros.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        if part.param_groups and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
    groups = [group for part in parts for group in part.param_groups]
    own = max((int(group["step"]) for group in groups if "step" in group), default=_NO_STEPS)
    steps = int(largest([own])[0])
    for group in groups:
        if not group["params"] and steps != _NO_STEPS:
            group["step"] = steps


def chain(
    original: Callable[..., None],
    self: ChainedOptimizer,
    chained_optimizers: list[MegatronOptimizer],
) -> None:
    """Leave out what has no parameters on any rank, unless nothing is trained at all."""
    parts = [part for part in chained_optimizers if part.optimizer is not None]
    original(self, parts or chained_optimizers)


def sharded_state_dict(
    original: Callable[..., dict[str, Any]],
    self: MegatronOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    **kwargs: object,
) -> dict[str, Any]:
    """Describe an optimizer's state without groups to load, and without what rank 0 has none of."""
    state = original(self, model_sharded_state_dict, is_loading, **kwargs)
    if not any(state.get("fp32_from_fp16_params", [True])):
        # Rank 0 would write an empty list where others have main parameters.
        del state["fp32_from_fp16_params"]
    if is_loading:
        # Else the groups would have to be as many as the checkpoint's.
        del state.get("optimizer", state)["param_groups"]
    return state


def load(
    original: Callable[..., None], self: MegatronOptimizer, state_dict: dict[str, Any]
) -> None:
    """Load moments and steps into this run's groups."""
    part = state_dict.get("optimizer", state_dict)
    # What is empty in the checkpoint is left out of what is read.
    part.setdefault("state", {})
    if "optimizer" in state_dict:
        state_dict.setdefault("fp32_from_fp16_params", [])
    part["param_groups"] = _going_on(part["param_groups"], self.optimizer)
    original(self, state_dict)


def _going_on(stored: Groups, optimizer: torch.optim.Optimizer) -> Groups:
    """Return this run's groups, as a state has them, at the number of steps of the stored ones."""
    groups: Groups = optimizer.state_dict()["param_groups"]
    for name in ("betas", "eps"):
        say_changed(f"Adam's {name}", _values(groups, name), _values(stored, name))
    steps = [group["step"] for group in stored if "step" in group]
    return [{**group, "step": steps[0]} for group in groups] if steps else groups


def _values(groups: Groups, name: str) -> str:
    return " and ".join(sorted({str(group[name]) for group in groups if name in group}))


def in_order(current_groups: Groups, state_dict_groups: Groups) -> Groups:
    """Pair groups by place: the loaded ones are this run's own."""
    return state_dict_groups


def with_eps(identifiers: tuple[str, ...]) -> tuple[str, ...]:
    """Let the distributed optimizer look a group up among its own by epsilon too."""
    return (*identifiers, "eps")
