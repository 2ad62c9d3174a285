"""What a resumed run learns by: its own rates, on a schedule of the shape that it had.

Megatron wants every number of a resumed run's schedule to be the checkpoint's, or one flag that
says which of the two to follow: --override-opt-param-scheduler or
--use-checkpoint-opt-param-scheduler, which mean here what they mean there. Without either, rates
and weight decay are this run's, and so is what decides nothing: a constant rate has no end.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import print_rank_0

from megalora.config import is_number

_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
_STEPS = ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")
_FLAGS = {
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_steps": "--lr-decay-iters, by default --train-iters",
    "lr_warmup_steps": "--lr-warmup-iters or --lr-warmup-fraction",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters",
}


def stored_rates(args: argparse.Namespace, stored: Mapping[str, Any] | None) -> dict[str, object]:
    """Return the rates of a checkpoint, by their names in args, where the run is to follow them.

    --use-checkpoint-opt-param-scheduler asks for it. They must be in args before the optimizer is
    made: its groups have rates of their own. stored: the state of the checkpoint's scheduler, None
    where it has none.
    """
    if not stored or not args.use_checkpoint_opt_param_scheduler or args.no_load_optim:
        return {}
    _check_numbers(stored)
    return {"lr": stored["max_lr"], "min_lr": stored["min_lr"]}


def load(
    original: Callable[..., None], self: OptimizerParamScheduler, stored: dict[str, Any]
) -> None:
    """Go on with a checkpoint's schedule, as OptimizerParamScheduler.load_state_dict."""
    _check_numbers(stored)
    _warn_of_lost_steps(self.optimizer, stored["num_steps"])
    if not (self.override_opt_param_scheduler or self.use_checkpoint_opt_param_scheduler):
        own = self.state_dict()
        _check_same_shape(own, stored)
        for name in _RATES:
            say_changed(name, own[name], stored[name])
        stored = {**own, "num_steps": stored["num_steps"]}
    original(self, stored)
    # Megatron sets the groups' weight decay before it has read it.
    self.step(0)


def _check_numbers(stored: Mapping[str, Any]) -> None:
    """Raise ValueError where a rate or a number of steps in a checkpoint is no finite number."""
    for name in (*_RATES, *_STEPS):
        if name in stored and not is_number(stored[name]):
            raise ValueError(
                f"the checkpoint's schedule has {name} {stored[name]!r}, no finite number: "
                "give another checkpoint, or set --no-load-optim to start the optimizer anew"
            )


def _warn_of_lost_steps(optimizer: MegatronOptimizer, done: int) -> None:
    """Say where a checkpoint of an older megalora counts samples, but not the steps of Adam."""
    groups = [group for group in optimizer.param_groups if "betas" in group]
    if done and groups and not any("step" in group for group in groups):
        print_rank_0(
            "WARNING: checkpoint does not say how many steps Adam has taken, so its first updates "
            "will be too large: set --no-load-optim to start the optimizer anew"
        )


def say_changed(name: str, own: object, stored: object) -> None:
    """Print what a resumed run does otherwise than the one that it goes on from."""
    if own != stored:
        print_rank_0(f"> LoRA: going on with {name} {own} instead of the checkpoint's {stored}")


def _check_same_shape(own: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise ValueError where this run's schedule changes rates at other times or in another way."""
    done = stored["num_steps"]
    ours, theirs = _shape(own, done), _shape(stored, done)
    wrong = [
        f"{name} ({_FLAGS[name]}) is {own[name]} but the checkpoint has {stored[name]}"
        for name in _FLAGS
        if own[name] != stored[name] and ours.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)} (steps are samples): set --override-opt-param-scheduler to follow "
            "this run's schedule from here, --use-checkpoint-opt-param-scheduler to follow the "
            "checkpoint's, or give the flags that it had"
        )


def _shape(schedule: Mapping[str, Any], done: int) -> dict[str, Any]:
    """Return what decides when and how the rates change from `done` samples on."""
    shape = {"lr_decay_style": schedule["lr_decay_style"]}
    if schedule["lr_decay_style"] != "constant":
        shape["lr_decay_steps"] = schedule["lr_decay_steps"]
    if schedule["lr_decay_style"] != "constant" or done < schedule["lr_warmup_steps"]:
        shape["lr_warmup_steps"] = schedule["lr_warmup_steps"]
    if schedule["start_wd"] != schedule["end_wd"]:
        shape |= {name: schedule[name] for name in ("wd_incr_style", "wd_incr_steps")}
    return shape
