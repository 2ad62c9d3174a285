"""The command line `megalora env`."""

import argparse
import json

from megalora.environment.report import as_text, collect


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Add the command `env` to argparse's subparsers and return its parser."""
    parser = subparsers.add_parser(
        "env",
        help="versions, devices and what is built: what a report of a bug needs",
        description="Print the versions of all that matters to a run, the devices, what the "
        "compiled ops are built for and whether they work, what each missing package would give, "
        "and the variables MEGALORA_*, NVTE_*, CUDA_* and NCCL_*. What is broken is said, and "
        "hides nothing else.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(func=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run `megalora env`."""
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0
