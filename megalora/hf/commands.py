"""What the commands that exchange with Hugging Face do, and print.

`one_process` imports Megatron, which has to be prepared and takes seconds: only where it is needed.
"""

import argparse
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megalora.config import LoRAConfig
from megalora.hf import offline
from megalora.hf.adapters import to_hf
from megalora.hf.check import check, format_of_export
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.files import TensorFiles
from megalora.hf.foreign import refuse_foreign
from megalora.hf.inspect import AdapterReport, describe, inspect_peft, is_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import read_adapter, read_adapter_directory, write_adapter
from megalora.hf.picture import check_picture, draw
from megalora.hf.run_flags import how_to_go_on
from megalora.hf.untrained import without_untrained
from megalora.model.config_json import hidden_size_of, load_config, model_shape, read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_flags
from megalora.model.shape import ModelShape
from megalora.printable import printable
from megalora.progress import Progress

OUTPUT_B = "output_layer_lora.lora_B"


def export(args: argparse.Namespace) -> None:
    """Write an adapter checkpoint as a PEFT directory."""
    start = time.monotonic()
    check_checkpoint(args.checkpoint)
    with Progress("reading the checkpoint"):
        offline.prepare()
        from megalora.hf import one_process

        tensors, config, facts = one_process.read_adapter(args.checkpoint)
    if config.init == "pissa":
        raise ValueError(
            f"checkpoint {args.checkpoint} started from `pissa`, whose start values only the base "
            "gives: start its run again with --export-hf, which goes on from it"
        )
    stored = one_process.stored_sizes(args.checkpoint)
    if args.hf_model:
        shape = model_shape(read_config(args.hf_model))
    else:
        shape = offline.checkpoint_shape(tensors, facts, _with_rows(stored, args.vocab_size))
    _check_base(shape, {**asdict(facts), **stored}, f"checkpoint {args.checkpoint}")
    if not shape.vocab_size and OUTPUT_B in tensors:
        raise ValueError(
            f"checkpoint {args.checkpoint} does not say how many rows the base's vocabulary has, "
            "as those of an older megalora: give --hf-model DIR, or --vocab-size (vocab_size in "
            "the base's config.json)"
        )
    factors = without_untrained(to_hf(tensors, config, shape))
    with Progress("writing the adapter"):
        _write(args, factors, config, shape)
    _say_done("exported", factors, args.output, start)


def _write(
    args: argparse.Namespace,
    factors: Mapping[str, LoRAFactors],
    config: LoRAConfig,
    shape: ModelShape,
) -> None:
    """Write what `export` has read, in the format that its flags name."""
    write_adapter(
        args.output,
        factors,
        base_model_name=args.base_name or args.hf_model or "",
        format=format_of_export(args, factors, config, shape),
        names=names_of(shape.model_type),
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts or None,
        moe_layers=shape.moe_layers or None,
        delta_layers=shape.delta_layers,
        overwrite=args.overwrite,
    )


def check_checkpoint(directory: str) -> None:
    """Raise ValueError for what plainly is no adapter checkpoint, before Megatron is imported."""
    if not Path(directory).is_dir():
        problem = "is no directory" if Path(directory).exists() else "does not exist"
        raise ValueError(
            f"checkpoint {directory!r} {problem}: give what --save of a training run named"
        )
    refuse_foreign(directory, checkpoints=True)
    if is_peft(directory):
        raise ValueError(
            f"checkpoint {directory!r} is a PEFT directory already: use it as it is, or give what "
            "--save of a training run named"
        )


@contextmanager
def _warning_in_lines() -> Iterator[None]:
    """Print what is warned of in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"warning: {printable(warning.message)}", file=sys.stderr)


def _with_rows(stored: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    return {**stored, "vocab_size": vocab_size} if vocab_size else dict(stored)


def _check_base(shape: ModelShape, stored: Mapping[str, Any], source: str) -> None:
    """Raise ValueError where sizes that the user gives are not those of a checkpoint's base."""
    given = asdict(shape)
    # Where the family is not known, the rows are what the run's tokenizer made of them.
    unsure = () if stored.get("model_type") else ("vocab_size", "model_type")
    wrong = [
        f"{name} is {given[name]!r} but {source} has {value!r}"
        for name, value in stored.items()
        if name in given and name not in unsure and given[name] != value
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: give the base that the adapter was trained on, or leave "
            "--hf-model and --vocab-size out"
        )


def import_adapter(args: argparse.Namespace) -> None:
    """Turn a PEFT directory into an adapter checkpoint."""
    start = time.monotonic()
    shape = model_shape(read_config(args.hf_model))
    with _warning_in_lines():
        factors = read_adapter(
            args.adapter,
            names=names_of(shape.model_type),
            hidden_size=shape.hidden_size,
            base=args.hf_model,
        )
    config = offline.infer_config(factors, shape)
    rank = args.rank or config.rank
    config = replace(
        config,
        rank=rank,
        # The scale stays.
        alpha=config.alpha * rank / config.rank,
        expert_rank=args.expert_rank or config.expert_rank,
    )
    with Progress("writing the checkpoint"):
        offline.prepare()
        from megalora.hf import one_process

        one_process.import_factors(
            args.output,
            factors,
            config,
            shape,
            padded_vocab_size=args.padded_vocab_size,
            overwrite=args.overwrite,
        )
    _say_done("imported", factors, args.output, start)
    print(how_to_go_on(factors, config, shape, hf_model=args.hf_model, checkpoint=args.output))


def merge(args: argparse.Namespace) -> None:
    """Add a PEFT adapter to the weights of its base."""
    start = time.monotonic()
    base = Path(args.hf_model)
    config = load_config(args.hf_model)
    names, hidden_size = names_of(str(config.get("model_type"))), hidden_size_of(config)
    with _warning_in_lines():
        adapter = read_adapter_directory(args.adapter, names=names, hidden_size=hidden_size)
    factors, trained = adapter.factors, adapter.trained_layers(base)
    total = len(TensorFiles(base).file_names())
    with Progress("merging", total, "files") as progress:
        untied = merge_adapter(
            base,
            factors,
            args.output,
            trained=trained,
            overwrite=args.overwrite,
            progress=progress.add,
        )
    _say_done("merged", factors, args.output, start)
    if trained:
        print(f"the adapter's own whole layers replaced the base's: {summarise(list(trained))}")
    if untied:
        print("the unembedding was tied and has its own weight now: lm_head.weight")


def inspect(args: argparse.Namespace) -> None:
    """Say what an adapter holds, and draw it."""
    if args.plot is not None:
        check_picture(args.plot)
    if not is_peft(args.directory):
        check_checkpoint(args.directory)
    report = inspect_peft(args.directory) if is_peft(args.directory) else _of_checkpoint(args)
    if args.plot is not None:
        draw(report, args.plot)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    print(report.table())
    print(f"{len(report.modules)} modules, {report.num_parameters:,} parameters")
    print(report.said_of_b())
    if args.plot is not None:
        print(f"drawn in {printable(args.plot)}")


def _of_checkpoint(args: argparse.Namespace) -> AdapterReport:
    offline.prepare()
    from megalora.hf import one_process

    tensors, config, facts = one_process.read_adapter(args.directory)
    output = tensors.get(OUTPUT_B)
    rows = 0 if output is None else output.shape[0]
    stored = {"vocab_size": rows, **one_process.stored_sizes(args.directory)}
    shape = offline.checkpoint_shape(tensors, facts, _with_rows(stored, args.vocab_size))
    return describe(
        to_hf(tensors, config, shape), directory=args.directory, kind="adapter checkpoint"
    )


def import_base(args: argparse.Namespace) -> None:
    """Turn a Hugging Face model into a Megatron checkpoint."""
    start = time.monotonic()
    with Progress("importing the base", unit="tensors") as progress:
        offline.prepare()
        from megalora.hf import one_process

        count = one_process.import_base(
            args.hf_model,
            args.output,
            dtype=getattr(torch, args.dtype),
            overwrite=args.overwrite,
            progress=progress.add,
        )
    seconds = time.monotonic() - start
    print(f"imported {count:,} parameters to {args.output} in {seconds:.1f} s")


def print_flags(args: argparse.Namespace) -> None:
    """Print Megatron's flags for a Hugging Face model."""
    config, stages = read_config(args.hf_model), args.pipeline_model_parallel_size
    print(shlex.join(megatron_flags(config, hybrid=args.hybrid, stages=stages)))


def _say_done(done: str, factors: Mapping[str, LoRAFactors], output: str, start: float) -> None:
    count = sum(module.num_parameters for module in factors.values())
    seconds = time.monotonic() - start
    print(f"{done} {len(factors)} modules, {count:,} parameters, to {output} in {seconds:.1f} s")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "export": export,
    "import": import_adapter,
    "merge": merge,
    "inspect": inspect,
    "check": check,
    "import-base": import_base,
    "flags": print_flags,
}
