"""`megalora check`: what a server will do with an adapter, of whomever, before it is started."""

import argparse
from collections.abc import Mapping

from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import Format
from megalora.hf.servers import SERVERS, choose_format, describe, judge_export, served_model
from megalora.hf.servers.outline import outline_of_directory
from megalora.model.config_json import load_config
from megalora.model.served import ServedModel
from megalora.model.shape import ModelShape
from megalora.printable import printable


def check(args: argparse.Namespace) -> int:
    """Print whether a server takes an adapter; the exit status is 1 where it does not."""
    server = SERVERS[args.server]
    outline = outline_of_directory(args.adapter)
    model = ServedModel.of(load_config(args.hf_model)) if args.hf_model else ServedModel()
    verdict = server.judge(outline, model)
    if not args.hf_model:
        verdict.warnings.append("--hf-model DIR of the base was not given, and may decide more")
    if verdict.accepted:
        lines = describe(args.server, outline, verdict)
    else:
        lines = [f"refused: {problem}" for problem in verdict.problems] + verdict.warnings
    print("\n".join(printable(line) for line in lines))
    print(f"(by the source of {server.title}, read on {server.seen}; it was not run)")
    return 0 if verdict.accepted else 1


def format_of_export(
    args: argparse.Namespace,
    factors: Mapping[str, LoRAFactors],
    config: LoRAConfig,
    shape: ModelShape,
) -> Format:
    """Return the format of `megalora export`, and print what its reader needs.

    Raises ValueError where the reader would refuse it.
    """
    model = served_model(args.hf_model, shape)
    shares_outer = config.expert_mode == "shared_outer"
    format = choose_format(args.export_for, args.format, model, shares_outer=shares_outer)
    for line in judge_export(factors, format, model, args.export_for):
        print(printable(line if args.export_for else f"WARNING: {line}"))
    return format
