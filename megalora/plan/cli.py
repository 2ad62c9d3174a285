"""The command line `megalora plan`: what is its own and what is of the script, and what it ends in.

Exit status: 0 the fullest rank fits, 1 it does not fit, 2 the input is wrong.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from megalora.plan.devices import DEVICES, NETWORKS

_EPILOG = """exit status: 0 the fullest rank fits --gpu-memory, 1 it does not, 2 the input is wrong.
docs/planning.md says what is exact, what is measured on the graph and what is by formula."""


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Add the command `plan` to argparse's subparsers and return its parser."""
    parser = subparsers.add_parser(
        "plan",
        help="check a launch script for any number of GPUs here, and say what each rank would hold",
        usage="megalora plan --world-size N [options] SCRIPT.py <flags of the script> "
        "--lora-rank 32 ...\n"
        "       megalora plan --world-size N [options] --hf-model DIR <Megatron's flags> "
        "--lora-rank 32 ...",
        description="Parse a launch script's flags as its ranks will, build the ranks that differ "
        "on shapes alone, run one training step of each without a GPU, and say what they hold, "
        "compute and send. Nothing is written, loaded or sent.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_own(parser)
    parser.add_argument("script", metavar="SCRIPT.py", nargs="?", help="what the ranks would run")
    parser.set_defaults(func=run)
    return parser


def _add_own(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--world-size", type=_positive, required=True, metavar="N", help="GPUs of the whole job")
    add("--gpus-per-node", type=_positive, default=8, metavar="N", help="default 8")
    add("--device", choices=DEVICES, default="h100", help="kind of GPU, default h100")
    add("--network", choices=NETWORKS, default="ndr", help="what connects nodes, default ndr")
    add("--gpu-memory", type=_gib, metavar="GIB", help="memory of a GPU, default the device's")
    add("--model", metavar="NAME", help="in place of --hf-model: a preset of `megalora recommend`")
    add("--rank", type=int, metavar="R", help="plan this rank alone")
    add("--json", metavar="FILE", help="write all that is known as JSON; -: print it, no table")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _gib(text: str) -> float:
    size = float(text)
    if not 0 < size < 2**20:
        raise argparse.ArgumentTypeError(f"{text} is no size of a GPU's memory in GiB")
    return size


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what follows `plan`: the command's own, the script's name included, and the script's.

    All that follows the script's name is the script's, --help included. Without a script, what the
    command does not know is Megatron's.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_own(own)
    flags = own._option_string_actions
    place = 0
    while place < len(words) and words[place].partition("=")[0] in flags:
        place += 1 if "=" in words[place] else 2
    if place < len(words) and not words[place].startswith("-"):
        return list(words[: place + 1]), list(words[place + 1 :])
    if any(word in ("-h", "--help") for word in words):
        return ["--help"], []
    return _without_script(words, flags)


def _without_script(words: Sequence[str], flags: dict[str, Any]) -> tuple[list[str], list[str]]:
    ours: list[str] = []
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        is_own = word.partition("=")[0] in flags
        (ours if is_own else rest).append(word)
        if is_own and "=" not in word and waiting:
            ours.append(waiting.pop(0))
    return ours, rest


def run(args: argparse.Namespace) -> int:
    """Plan, and print or write what is found; ValueError says what to change."""
    # It imports torch, which --help must not wait for.
    command: Any = importlib.import_module("megalora.plan.command")
    return command.plan(args)
