"""All that a run changes in Megatron's args, and the one function that writes it.

What is to change is decided by functions that only read args.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megalora.config import LoRAConfig
from megalora.quiet import has_one_logger
from megalora.training.auto_lr import auto_rate
from megalora.training.rates import check_rates

Changes = dict[str, object]
# An interval in iterations that no run reaches: Megatron saves at the end of it all the same.
_NEVER = 1 << 31


def change_args(args: argparse.Namespace, changes: Mapping[str, object]) -> None:
    """Write changes into args, whose names they have: nothing else in `training` does."""
    vars(args).update(changes)


def on_validating(args: argparse.Namespace) -> Changes:
    """Let --save without --save-interval save after the last iteration; ask for no one_logger.

    Megatron has no default and would raise a bare AssertionError. Its ends by a signal or by
    --exit-duration-in-mins save too.
    """
    changes: Changes = {} if has_one_logger() else {"enable_one_logger": False}
    if args.save and getattr(args, "lora_rank", 0) and args.save_interval is None:
        changes["save_interval"] = args.train_iters or _NEVER
    return changes


def before_building(args: argparse.Namespace, config: LoRAConfig | None) -> Changes:
    """Give the rate that --lr auto stands for, and optimizer states of any layout.

    Raises ValueError where there is no such rate, or a rate is not finite.
    """
    rate = auto_rate(args, config)
    changes: Changes = {} if rate is None else {"lr": rate}
    if config is not None:
        check_rates(config, {**vars(args), **changes})
    is_sharded = args.use_distributed_optimizer and args.non_persistent_ckpt_type != "local"
    if config is not None and is_sharded:
        # The states of adapters are small, and Megatron's default cannot change TP or PP.
        changes["dist_ckpt_optim_fully_reshardable"] = True
    return changes


def before_loading(args: argparse.Namespace, description: Mapping[str, Any] | None) -> Changes:
    """Keep Megatron from loading the base once more, over the adapters, or what is not there.

    description: what the checkpoint in --load, which is left to Megatron, stores with its adapters;
    None where it has none.
    """
    changes: Changes = {"pretrained_checkpoint": None, "finetune": False}
    if description is not None:
        if description["distributed_optimizer"] is None:
            changes["no_load_optim"] = True
        if not description["random_states"]:
            changes["no_load_rng"] = True
        return changes
    wants_exit = args.exit_on_missing_checkpoint and args.load
    if not wants_exit and args.non_persistent_ckpt_type is None:
        changes["load"] = None
    return changes


def when_done(args: argparse.Namespace) -> Changes:
    """Leave nothing to do to a run that starts again after its last iteration.

    A scheduler starts one where its signal to stop meets the end of the run.
    """
    if not args.train_iters or args.iteration < args.train_iters:
        return {}
    return dict.fromkeys(("do_train", "do_valid", "do_test"), False)
