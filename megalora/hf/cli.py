"""The commands `export`, `import`, `merge`, `inspect`, `import-base` and `flags`."""

import argparse
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalora.model.config_json import load_config, model_shape, read_config
from megalora.model.megatron import megatron_flags

_HF_MODEL = "directory of the base: config.json and safetensors"


def add_parsers(subparsers: Any) -> None:
    """Add the commands that exchange with Hugging Face to argparse's subparsers."""
    for add in (_add_export, _add_import, _add_merge, _add_inspect, _add_import_base, _add_flags):
        add(subparsers)


def _command(
    subparsers: Any, name: str, func: Callable[[argparse.Namespace], int], about: str, more: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=about, description=f"{about}. {more}")
    parser.set_defaults(func=func)
    return parser


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")


def _add_export(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "export",
        _export,
        "Write an adapter checkpoint as a PEFT directory",
        "PEFT, vLLM and SGLang load the result. The base model is not needed, on any number of "
        "GPUs the adapter was trained.",
    )
    parser.add_argument("checkpoint", help="what --save of the training run named")
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--format",
        default="peft",
        choices=("peft", "uniform", "peft-3d"),
        help="peft: PEFT and vLLM >= 0.32 (default); uniform: one rank, scale folded in, for "
        "SGLang and older vLLM; peft-3d: a layer's experts in one tensor",
    )
    parser.add_argument("--hf-model", metavar="DIR", help=_HF_MODEL + "; only its sizes are read")
    parser.add_argument("--base-name", help="name of the base to write, default: --hf-model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="rows of the base's vocabulary, where --hf-model is not given",
    )


def _export(args: argparse.Namespace) -> int:
    from megalora.hf.adapters import to_hf
    from megalora.hf.offline import checkpoint_shape, read_adapter
    from megalora.hf.peft import write_adapter

    start = time.monotonic()
    tensors, config, facts = read_adapter(args.checkpoint)
    if args.hf_model:
        shape = model_shape(read_config(args.hf_model))
    else:
        shape = checkpoint_shape(tensors, facts, vocab_size=args.vocab_size or 0)
    factors = to_hf(tensors, config, shape)
    write_adapter(
        args.output,
        factors,
        base_model_name=args.base_name or args.hf_model or "",
        format=args.format,
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts or None,
        moe_layers=shape.moe_layers or None,
        overwrite=args.overwrite,
    )
    _summary("exported", factors, args.output, start)
    return 0


def _add_import(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "import",
        _import,
        "Turn a PEFT directory into an adapter checkpoint",
        "Training continues from it with --load, on any parallel layout. (--lora-load reads a PEFT "
        "directory as it is.)",
    )
    parser.add_argument("adapter", help="PEFT directory, of megalora or of anybody else")
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--padded-vocab-size", type=int, help="rows of Megatron's output_layer, default: no padding"
    )
    parser.add_argument("--rank", type=int, help="a higher rank than the adapter's")
    parser.add_argument("--expert-rank", type=int, help="a higher rank than the experts'")


def _import(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from megalora.hf.adapters import from_hf
    from megalora.hf.offline import infer_config, prepare, write_adapter_checkpoint
    from megalora.hf.peft import read_adapter

    start = time.monotonic()
    shape = model_shape(read_config(args.hf_model))
    factors = read_adapter(args.adapter, hidden_size=shape.hidden_size)
    config = infer_config(factors, shape)
    rank = args.rank or config.rank
    config = replace(
        config,
        rank=rank,
        # The scale stays.
        alpha=config.alpha * rank / config.rank,
        expert_rank=args.expert_rank or config.expert_rank,
    )
    prepare()
    from megalora.adapters.start import draw_uniform

    tensors = from_hf(
        factors,
        config,
        shape,
        padded_vocab_size=args.padded_vocab_size,
        fresh_a=draw_uniform,
    )
    write_adapter_checkpoint(args.output, tensors, config, shape, overwrite=args.overwrite)
    _summary("imported", factors, args.output, start)
    expert = f" --lora-expert-rank {config.expert_rank}" if config.expert_rank else ""
    targets = " ".join(config.targets)
    print(f"train on with --lora-rank {rank} --lora-alpha {config.alpha:g}{expert}, on {targets}")
    return 0


def _add_merge(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "merge",
        _merge,
        "Add a PEFT adapter to the weights of its base",
        "The result has the files of the base and needs no adapter. One file is in memory at a "
        "time.",
    )
    parser.add_argument("adapter", help="PEFT directory")
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")


def _merge(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megalora.hf.files import TensorFiles
    from megalora.hf.merge import merge_adapter
    from megalora.hf.peft import read_adapter

    start = time.monotonic()
    factors = read_adapter(args.adapter, hidden_size=_hidden_size(args.hf_model))
    total = len(TensorFiles(Path(args.hf_model)).file_names())
    with tqdm(total=total, unit="file", desc="merging", disable=None) as bar:
        untied = merge_adapter(
            args.hf_model,
            factors,
            args.output,
            overwrite=args.overwrite,
            progress=lambda _name: bar.update(),
        )
    _summary("merged", factors, args.output, start)
    if untied:
        print("the unembedding was tied and has its own weight now: lm_head.weight")
    return 0


def _hidden_size(directory: str) -> int | None:
    return load_config(directory).get("hidden_size")


def _add_inspect(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "inspect",
        _inspect,
        "Say what an adapter holds",
        "Targets, ranks, scales, parameters, and norms of A, B and the update, with warnings.",
    )
    parser.add_argument("directory", help="PEFT directory or adapter checkpoint")
    parser.add_argument("--vocab-size", type=int, help="of the base, for an adapter checkpoint")
    parser.add_argument("--json", action="store_true", help="print every module as JSON")


def _inspect(args: argparse.Namespace) -> int:
    from megalora.hf.inspect import inspect_peft, is_peft

    report = inspect_peft(args.directory) if is_peft(args.directory) else _checkpoint_report(args)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    print(report.table())
    print(f"{len(report.modules)} modules, {report.num_parameters:,} parameters")
    return 0


def _checkpoint_report(args: argparse.Namespace) -> Any:
    from megalora.hf.adapters import to_hf
    from megalora.hf.inspect import describe
    from megalora.hf.offline import checkpoint_shape, read_adapter

    tensors, config, facts = read_adapter(args.directory)
    output = tensors.get("output_layer_lora.lora_B")
    rows = 0 if output is None else output.shape[0]
    shape = checkpoint_shape(tensors, facts, vocab_size=args.vocab_size or rows)
    return describe(
        to_hf(tensors, config, shape), directory=args.directory, kind="adapter checkpoint"
    )


def _add_import_base(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "import-base",
        _import_base,
        "Turn a Hugging Face model into a Megatron checkpoint",
        "For --pretrained-checkpoint, on any parallel layout. The whole model is held in memory; "
        "--hf-model of a training run loads the same weights without that.",
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)
    _add_output(parser, "directory to write, whole or not at all")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of weights"
    )


def _import_base(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from megalora.hf.offline import import_base

    start = time.monotonic()
    with tqdm(unit="tensor", desc="loading", disable=None) as bar:
        count = import_base(
            args.hf_model,
            args.output,
            dtype=getattr(torch, args.dtype),
            overwrite=args.overwrite,
            progress=lambda _name: bar.update(),
        )
    seconds = time.monotonic() - start
    print(f"imported {count:,} parameters to {args.output} in {seconds:.1f} s")
    return 0


def _add_flags(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "flags",
        _flags,
        "Print Megatron's flags for a Hugging Face model",
        "Paste them into any Megatron launch script.",
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR", help=_HF_MODEL)


def _flags(args: argparse.Namespace) -> int:
    print(shlex.join(megatron_flags(read_config(args.hf_model))))
    return 0


def _summary(done: str, factors: Any, output: str, start: float) -> None:
    count = sum(module.num_parameters for module in factors.values())
    seconds = time.monotonic() - start
    print(f"{done} {len(factors)} modules, {count:,} parameters, to {output} in {seconds:.1f} s")
