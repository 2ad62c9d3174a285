"""`--lora-log-interval`, which `megalora.training.inside` follows."""

import argparse


def add_log_args(parser: argparse.ArgumentParser) -> None:
    """Add the flag by which a run logs what happens inside its adapters."""
    group = parser.add_argument_group("adapters in training", "what is logged of them")
    group.add_argument(
        "--lora-log-interval",
        type=interval,
        metavar="N",
        help="log the norms of A, B and the update by kind of module every N iterations, through "
        "Megatron's writers and in one line (default: never)",
    )


def interval(text: str) -> int:
    """Return the number of iterations that a flag gives, 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no interval: give a whole number of iterations, 1 or more, or leave "
            "--lora-log-interval out"
        )
    return number
