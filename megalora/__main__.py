"""The command line `megalora`, or `python -m megalora`."""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import megalora
from megalora import quiet
from megalora.hf.signals import Stopped, stopping
from megalora.misspelt import Parser
from megalora.plan.cli import split
from megalora.printable import printable

# Modules with parsers of commands, and the function that adds them.
_PARSERS = (
    ("megalora.recommend", "add_parser"),
    ("megalora.plan.cli", "add_parser"),
    ("megalora.hf.cli", "add_parsers"),
    ("megalora.environment.cli", "add_parser"),
)
# What the parsers of these commands need: `run` starts fast, `env` starts where others cannot.
_ALONE = {"run": (), "env": _PARSERS[-1:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 2 where the user's input is wrong or a file cannot be read or written, and 128 and the
    signal's number where a signal ended the command.
    """
    quiet.install()
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, rest = _script_first(argv)
    parser = make_parser(argv[0] if argv else "")
    args = parser.parse_args(argv)
    args.rest = rest
    output = getattr(args, "output", None)
    before = _identity(output)
    try:
        # A script that is run has signal handlers of its own.
        with nullcontext() if argv[:1] == ["run"] else stopping():
            status = args.func(args) or 0
            sys.stdout.flush()
            return status
    except Stopped as stop:
        done = f"{output} is written" if _identity(output) != before else "nothing was written"
        print(f"error: stopped by {stop.signal.name}: {printable(done)}", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:
        if argv[:1] == ["run"]:
            raise
        # Who read the output, as `head`, has enough; what is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # Of a script only its own traceback says where.
        if argv[:1] == ["run"] or os.environ.get("MEGALORA_TRACEBACK"):
            raise
        print(f"error: {printable(_sentence(error))}", file=sys.stderr)
    except ValueError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
    return 2


def _script_first(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line: what is megalora's, and what is of the script that it runs.

    What follows the script's name is the script's, --help included, and so is --cpu before it.
    """
    if argv[:1] == ["plan"]:
        ours, rest = split(argv[1:])
        return ["plan", *ours], rest
    words, moved = list(argv), []
    while words and words[0] == "--cpu" and "run" in words:
        moved.append(words.pop(0))
    if words[:1] != ["run"]:
        return list(argv), []
    while words[1:2] == ["--cpu"]:
        moved.append(words.pop(1))
    # Else an option in its place would only be "unrecognized".
    end = [] if words[1:2] in (["-h"], ["--help"]) else ["--"]
    return ["run", *end, *words[1:2]], [*words[2:], *moved]


def _sentence(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{os.fspath(error.filename)}: {reason}"


def _identity(directory: str | None) -> tuple[int, int] | None:
    """Return what tells a directory from another that takes its place."""
    try:
        status = os.stat(directory or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def make_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of all commands, or that of one which must not wait for the others."""
    parser = Parser(
        prog="megalora",
        description="LoRA for NVIDIA Megatron. Start with `megalora recommend`, which says what to "
        "train with; `megalora plan` checks a run of any size here; then `torchrun ... -m megalora "
        "run SCRIPT.py`; then `megalora export`.",
    )
    parser.add_argument("--version", action="version", version=megalora.__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(subparsers)
    for module, function in _ALONE.get(command, _PARSERS):
        if importlib.util.find_spec(module) is not None:
            getattr(importlib.import_module(module), function)(subparsers)
    return parser


def _add_run(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run an unmodified Megatron launch script with LoRA",
        usage="megalora run SCRIPT.py <flags of the script> --lora-rank 32 ...",
        description="Run a Megatron launch script with LoRA, unmodified: under torchrun as "
        "`torchrun ... -m megalora run pretrain_gpt.py <flags>`. The script's own --help shows the "
        "LoRA flags. Without a CUDA device, or with --cpu, it runs on the CPU over gloo.",
    )
    parser.add_argument(
        "script",
        metavar="SCRIPT.py",
        type=_script,
        help="the launch script; what follows is its own",
    )
    parser.set_defaults(func=_run)


def _script(name: str) -> str:
    """Return the name of a script as it is; argparse's error where an option is in its place."""
    if name.startswith("-"):
        raise argparse.ArgumentTypeError(
            f"{name} stands before the script: give the script first, then its flags and those of "
            f"LoRA: megalora run SCRIPT.py {name} ..."
        )
    return name


def _run(args: argparse.Namespace) -> None:
    # Imported here: it imports torch, which --help must not wait for.
    from megalora.run import run_script

    run_script(args.script, args.rest)


if __name__ == "__main__":
    sys.exit(main())
