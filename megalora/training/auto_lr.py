"""`--lr auto`: the learning rate that "LoRA Without Regret" gives the model that a run trains."""

import argparse
import math

from megalora.config import LoRAConfig
from megalora.model.families import rate_exponents
from megalora.model.hybrid import mismatch
from megalora.recommend import recommend_for_args

# What `auto` is until the model's sizes are known: Megatron only checks that --min-lr is not above.
AUTO = math.inf


def add_auto_lr_args(parser: argparse.ArgumentParser) -> None:
    """Add --lora-family, and let Megatron's --lr be `auto`."""
    group = parser.add_argument_group(
        "learning rate", "with --lr auto it is what `megalora recommend` gives for the model"
    )
    group.add_argument(
        "--lora-family",
        choices=sorted(rate_exponents()),
        help="family of the rule behind --lr auto, where the model's sizes do not tell it",
    )
    accept_auto(parser)


def accept_auto(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let the --lr that Megatron has added to a parser take `auto` beside numbers."""
    for action in parser._actions:
        if "--lr" in action.option_strings:
            action.type = number_or_auto
    return parser


def number_or_auto(text: str) -> float:
    """Return the rate that a flag gives; `AUTO` for auto. It must be finite."""
    if text == "auto":
        return AUTO
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not math.isfinite(rate):
        raise argparse.ArgumentTypeError(f"{text} is no rate: give a finite number, or auto")
    return rate


def auto_rate(args: argparse.Namespace, config: LoRAConfig | None) -> float | None:
    """Return the recommended rate where args.lr is auto, and print what it follows from.

    args: Megatron's parsed and validated flags. Raises ValueError without LoRA, for a hybrid model
    that equals no GPT model or a family that the rule was not fitted to, and where --min-lr is
    above the rate.
    """
    if args.lr != AUTO:
        return None
    if config is None:
        raise ValueError("lr is auto, but there is no LoRA: set --lora-rank, or --lr to a number")
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern and (problem := mismatch(pattern)):
        raise ValueError(
            f"lr is auto, but {problem}: the rule was fitted to "
            f"{' and '.join(map(str.capitalize, rate_exponents()))} models; set --lr to a number"
        )
    result = recommend_for_args(args, config, family=args.lora_family or "")
    if args.min_lr > result.learning_rate:
        raise ValueError(
            f"min_lr is {args.min_lr:g}, above the rate {result.learning_rate:.3g} that lr auto "
            "gives: leave --min-lr out, or give --lr a number"
        )
    if args.rank == 0:
        schedule = _schedule(result.learning_rate, args.lr_decay_style)
        print(f"{result.table()}\n{schedule}", flush=True)
    return result.learning_rate


def _schedule(rate: float, decay_style: str) -> str:
    said = f"> lr auto: {rate:.3e}"
    if decay_style != "constant":
        said += f", falling ({decay_style}); the rule is for --lr-decay-style constant"
    return said
