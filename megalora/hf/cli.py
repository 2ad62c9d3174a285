"""The parsers of `export`, `import`, `merge`, `inspect`, `import-base` and `flags`."""

import argparse

from megalora.hf.directories import check_place

Subparsers = argparse._SubParsersAction

_HF_MODEL = "directory of the base: config.json and safetensors"
# The names in `megalora.hf.servers.SERVERS`, which takes seconds to import.
READERS = ("peft", "vllm", "sglang", "tinker")
# Of `export` and of a run's --export-format.
FORMAT_HELP = (
    "peft: PEFT and vLLM >= 0.32 (default); uniform: one rank, scale folded in, for SGLang and "
    "older vLLM; peft-3d: a layer's experts in one tensor; tinker: as Tinker and SGLang have it, "
    "for --lora-expert-mode shared_outer"
)


def add_parsers(subparsers: Subparsers) -> None:
    """Add the commands that exchange with Hugging Face to argparse's subparsers."""
    for add in (_add_export, _add_import, _add_merge, _add_inspect, _add_check):
        add(subparsers)
    for add in (_add_import_base, _add_flags):
        add(subparsers)


def _command(subparsers: Subparsers, name: str, about: str, more: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=about, description=f"{about}. {more}")
    parser.set_defaults(func=_run, command=name)
    return parser


def _run(args: argparse.Namespace) -> int:
    if hasattr(args, "output"):
        # What is read, by its name on the command line.
        names = {"checkpoint": "checkpoint", "adapter": "adapter", "--hf-model": "hf_model"}
        inputs = {name: getattr(args, field, None) for name, field in names.items()}
        check_place(args.output, overwrite=args.overwrite, inputs=inputs)
    # It imports torch, which --help must not wait for.
    from megalora.hf.commands import COMMANDS

    return COMMANDS[args.command](args) or 0


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help=what)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier --output, of which megalora wrote every file",
    )


def _add_export(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "export",
        "Write an adapter checkpoint as a PEFT directory",
        "PEFT, vLLM and SGLang load the result. The base model is not needed, on any number of "
        "GPUs the adapter was trained.",
    )
    parser.add_argument("checkpoint", help="what --save of the training run named")
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--export-for",
        choices=READERS,
        help="who is to read it: chooses the format, and refuses what they would refuse",
    )
    parser.add_argument(
        "--format",
        choices=("peft", "uniform", "peft-3d", "tinker"),
        help=FORMAT_HELP,
    )
    parser.add_argument("--hf-model", metavar="DIR", help=_HF_MODEL + "; only its sizes are read")
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="what the adapter is to call its base (default: --hf-model)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the base's vocabulary, for a checkpoint that does not say it",
    )


def _add_import(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "import",
        "Turn a PEFT directory into an adapter checkpoint",
        "Training continues from it with the flags that this prints, on any parallel layout. "
        "(--lora-load reads a PEFT directory as it is.)",
    )
    parser.add_argument("adapter", help="PEFT directory, of megalora or of anybody else")
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--padded-vocab-size",
        type=int,
        metavar="N",
        help="rows of Megatron's output_layer (default: no padding)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="a higher rank than the adapter's, to train on with"
    )
    parser.add_argument(
        "--expert-rank", type=int, metavar="N", help="a higher rank than the experts' own"
    )


def _add_merge(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "merge",
        "Add a PEFT adapter to the weights of its base",
        "The result has the files of the base and needs no adapter. One file is in memory at a "
        "time.",
    )
    parser.add_argument("adapter", help="PEFT directory")
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")


def _add_inspect(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "inspect",
        "Say what an adapter holds",
        "Targets, ranks, scales, parameters, and norms of A, B and the update, with warnings.",
    )
    parser.add_argument("directory", help="PEFT directory or adapter checkpoint")
    parser.add_argument("--vocab-size", type=int, help="of the base, for an adapter checkpoint")
    parser.add_argument("--json", action="store_true", help="print every module as JSON")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the update and the spectral norms of A and B by layer and kind of module: a "
        "new .png, .svg or .pdf; needs matplotlib",
    )


def _add_check(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "check",
        "Say whether a server will take an adapter",
        "And which flags it needs, by what its source does with it. The exit status is 0 where it "
        "serves what was trained, 1 where it refuses, or would serve something else.",
    )
    parser.add_argument("adapter", help="PEFT directory, of megalora or of anybody else")
    parser.add_argument("--for", dest="server", required=True, choices=READERS, help="who reads it")
    parser.add_argument("--hf-model", metavar="DIR", help=_HF_MODEL + "; config.json is read")


def _add_import_base(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "import-base",
        "Turn a Hugging Face model into a Megatron checkpoint",
        "For --pretrained-checkpoint, on any parallel layout. The whole model is held in memory; "
        "--hf-model of a training run loads the same weights without that.",
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights that are written (default bfloat16)",
    )


def _add_flags(subparsers: Subparsers) -> None:
    parser = _command(
        subparsers,
        "flags",
        "Print Megatron's flags for a Hugging Face model",
        "Paste them into any Megatron launch script.",
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    parser.add_argument(
        "--hybrid",
        action="store_true",
        help="of the HybridModel that equals it, for scripts such as pretrain_hybrid.py",
    )
    parser.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="stages of --hybrid's --hybrid-layer-pattern (default 1)",
    )
