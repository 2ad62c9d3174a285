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
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from megalora.hf import offline
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.files import TensorFiles
from megalora.hf.foreign import refuse_foreign
from megalora.hf.inspect import AdapterReport, describe, inspect_peft, is_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import read_adapter, read_adapter_directory, write_adapter
from megalora.hf.peft_experts import without_untrained
from megalora.model.config_json import hidden_size_of, load_config, model_shape, read_config
from megalora.model.megatron import megatron_flags
from megalora.printable import printable


def export(args: argparse.Namespace) -> None:
    """Write an adapter checkpoint as a PEFT directory."""
    start = time.monotonic()
    offline.prepare()
    from megalora.hf import one_process

    tensors, config, facts = one_process.read_adapter(args.checkpoint)
    if args.hf_model:
        shape = model_shape(read_config(args.hf_model))
    else:
        shape = offline.checkpoint_shape(tensors, facts, vocab_size=args.vocab_size or 0)
    factors = without_untrained(to_hf(tensors, config, shape))
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
    _say_done("exported", factors, args.output, start)


@contextmanager
def _warning_in_lines() -> Iterator[None]:
    """Print what is warned of in one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"warning: {printable(warning.message)}", file=sys.stderr)


def import_adapter(args: argparse.Namespace) -> None:
    """Turn a PEFT directory into an adapter checkpoint."""
    start = time.monotonic()
    shape = model_shape(read_config(args.hf_model))
    with _warning_in_lines():
        factors = read_adapter(args.adapter, hidden_size=shape.hidden_size, base=args.hf_model)
    config = offline.infer_config(factors, shape)
    rank = args.rank or config.rank
    config = replace(
        config,
        rank=rank,
        # The scale stays.
        alpha=config.alpha * rank / config.rank,
        expert_rank=args.expert_rank or config.expert_rank,
    )
    offline.prepare()
    from megalora.adapters.start import draw_uniform
    from megalora.hf import one_process

    tensors = from_hf(
        factors,
        config,
        shape,
        padded_vocab_size=args.padded_vocab_size,
        fresh_a=draw_uniform,
    )
    one_process.write_adapter_checkpoint(
        args.output, tensors, config, shape, overwrite=args.overwrite
    )
    _say_done("imported", factors, args.output, start)
    expert = f" --lora-expert-rank {config.expert_rank}" if config.expert_rank else ""
    expert += " --lora-expert-mode shared_outer" if config.expert_mode == "shared_outer" else ""
    targets = " ".join(config.targets)
    print(f"train on with --lora-rank {rank} --lora-alpha {config.alpha:g}{expert}, on {targets}")


def merge(args: argparse.Namespace) -> None:
    """Add a PEFT adapter to the weights of its base."""
    start = time.monotonic()
    base = Path(args.hf_model)
    hidden_size = hidden_size_of(load_config(args.hf_model))
    with _warning_in_lines():
        adapter = read_adapter_directory(args.adapter, hidden_size=hidden_size)
    factors, trained = adapter.factors, adapter.trained_layers(base)
    total = len(TensorFiles(base).file_names())
    with tqdm(total=total, unit="file", desc="merging", disable=None) as bar:
        untied = merge_adapter(
            base,
            factors,
            args.output,
            trained=trained,
            overwrite=args.overwrite,
            progress=lambda _name: bar.update(),
        )
    _say_done("merged", factors, args.output, start)
    if trained:
        print(f"the adapter's own whole layers replaced the base's: {summarise(list(trained))}")
    if untied:
        print("the unembedding was tied and has its own weight now: lm_head.weight")


def inspect(args: argparse.Namespace) -> None:
    """Say what an adapter holds."""
    refuse_foreign(args.directory, checkpoints=True)
    report = inspect_peft(args.directory) if is_peft(args.directory) else _of_checkpoint(args)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    print(report.table())
    print(f"{len(report.modules)} modules, {report.num_parameters:,} parameters")


def _of_checkpoint(args: argparse.Namespace) -> AdapterReport:
    offline.prepare()
    from megalora.hf import one_process

    tensors, config, facts = one_process.read_adapter(args.directory)
    output = tensors.get("output_layer_lora.lora_B")
    rows = 0 if output is None else output.shape[0]
    shape = offline.checkpoint_shape(tensors, facts, vocab_size=args.vocab_size or rows)
    return describe(
        to_hf(tensors, config, shape), directory=args.directory, kind="adapter checkpoint"
    )


def import_base(args: argparse.Namespace) -> None:
    """Turn a Hugging Face model into a Megatron checkpoint."""
    start = time.monotonic()
    offline.prepare()
    from megalora.hf import one_process

    with tqdm(unit="tensor", desc="loading", disable=None) as bar:
        count = one_process.import_base(
            args.hf_model,
            args.output,
            dtype=getattr(torch, args.dtype),
            overwrite=args.overwrite,
            progress=lambda _name: bar.update(),
        )
    seconds = time.monotonic() - start
    print(f"imported {count:,} parameters to {args.output} in {seconds:.1f} s")


def print_flags(args: argparse.Namespace) -> None:
    """Print Megatron's flags for a Hugging Face model."""
    print(shlex.join(megatron_flags(read_config(args.hf_model))))


def _say_done(done: str, factors: Mapping[str, LoRAFactors], output: str, start: float) -> None:
    count = sum(module.num_parameters for module in factors.values())
    seconds = time.monotonic() - start
    print(f"{done} {len(factors)} modules, {count:,} parameters, to {output} in {seconds:.1f} s")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "export": export,
    "import": import_adapter,
    "merge": merge,
    "inspect": inspect,
    "import-base": import_base,
    "flags": print_flags,
}
