"""`--lr auto`: the learning rate that "LoRA Without Regret" gives the model that a run trains."""

import argparse
import itertools
import math
import sys

from megalora.config import LoRAConfig
from megalora.model.families import rate_exponents
from megalora.recommend import recommend_for_args

# What `auto` is until the model's sizes are known: Megatron only checks that --min-lr is not above.
AUTO = math.inf


def add_auto_lr_args(parser: argparse.ArgumentParser) -> None:
    """Add --lora-family, and let --lr be `auto` on the command line of this process.

    NOTE: Megatron's --lr is a float, also where Megatron parses the command line once more without
    the flags of a script. So `auto` is spelled `inf` in sys.argv, which no run can mean.
    """
    group = parser.add_argument_group(
        "learning rate", "--lr auto takes the rate that `megalora recommend` gives for the model"
    )
    group.add_argument(
        "--lora-family",
        choices=sorted(rate_exponents()),
        help="family of the rule behind --lr auto, where the model's sizes do not tell it",
    )
    sys.argv[:] = spell_auto(sys.argv)


def spell_auto(argv: list[str]) -> list[str]:
    """Return a command line in which the rate `auto` is written as the float that means it."""
    spelled = [f"--lr={AUTO}" if word == "--lr=auto" else word for word in argv]
    for place, (flag, value) in enumerate(itertools.pairwise(spelled), start=1):
        if (flag, value) == ("--lr", "auto"):
            spelled[place] = str(AUTO)
    return spelled


def set_auto_lr(args: argparse.Namespace, config: LoRAConfig | None) -> None:
    """Put the recommended rate into args.lr where it is auto, and print what it follows from.

    args: Megatron's parsed and validated flags. Raises ValueError without LoRA, for a hybrid model
    or a family that the rule was not fitted to, and where --min-lr is above the rate.
    """
    if args.lr != AUTO:
        return
    if config is None:
        raise ValueError("lr is auto, but there is no LoRA: set --lora-rank, or --lr to a number")
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        raise ValueError(
            f"lr is auto, but hybrid_layer_pattern is {pattern!r}: the rule was fitted to "
            f"{' and '.join(map(str.capitalize, rate_exponents()))} models; set --lr to a number"
        )
    result = recommend_for_args(args, config, family=args.lora_family or "")
    if args.min_lr > result.learning_rate:
        raise ValueError(
            f"min_lr is {args.min_lr:g}, above the rate {result.learning_rate:.3g} that lr auto "
            "gives: leave --min-lr out, or give --lr a number"
        )
    args.lr = result.learning_rate
    if args.rank == 0:
        print(f"{result.table()}\n{_schedule(args)}", flush=True)


def _schedule(args: argparse.Namespace) -> str:
    said = f"> lr auto: {args.lr:.3e}"
    if args.lr_decay_style != "constant":
        said += f", falling ({args.lr_decay_style}); the rule is for --lr-decay-style constant"
    return said
