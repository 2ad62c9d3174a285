"""What a run leaves beside its checkpoints: checked when adapters are attached, written at its end.

Both, --export-hf and --save-merged, would else be refused after days of training.
"""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.training import get_signal_handler

from megalora.adapters import merge
from megalora.checkpoint.layout import read_iteration
from megalora.checkpoint.merged import save_merged
from megalora.checkpoint.ranks import on_all_ranks
from megalora.config import LoRAConfig
from megalora.hf import exchange
from megalora.hf.directories import WholeDirectory
from megalora.hf.peft import Format
from megalora.progress import Progress


def check_outputs(
    model_chunks: Sequence[torch.nn.Module], args: argparse.Namespace, config: LoRAConfig
) -> None:
    """Raise ValueError, on every rank, where something could not be written after training.

    All ranks must call it, once the adapters are attached. Warns of what a server would refuse.
    """
    if args.export_hf:
        on_all_ranks(lambda: _check_writable("export_hf", args.export_hf), only=0)
        _, lines = _check_export(model_chunks, args, config)
        start = "> LoRA:" if args.export_for else "WARNING:"
        for line in lines if dist.get_rank() == 0 else ():
            print(f"{start} export_hf: {line}", flush=True)
    if args.save_merged:
        on_all_ranks(lambda: _check_writable("save_merged", args.save_merged))
        on_all_ranks(lambda: merge.check(model_chunks))


def _check_export(
    model_chunks: Sequence[torch.nn.Module], args: argparse.Namespace, config: LoRAConfig
) -> tuple[Format, list[str]]:
    return exchange.check_export(
        model_chunks,
        config=config,
        vocab_size=args.vocab_size,
        hf_model=args.hf_model,
        format=args.export_format,
        server=args.export_for,
    )


def write_outputs(
    model_chunks: Sequence[torch.nn.Module], args: argparse.Namespace, config: LoRAConfig
) -> None:
    """Write what --export-hf and --save-merged ask for. All ranks must call it."""
    if args.export_hf:
        with Progress("exporting the adapter"):
            exchange.export_adapter(
                model_chunks,
                args.export_hf,
                config=config,
                format=_check_export(model_chunks, args, config)[0],
                base_model_name=args.hf_model or "",
                hf_model=args.hf_model,
                vocab_size=args.vocab_size,
            )
    if args.save_merged:
        with Progress("saving the merged model"):
            _write_merged(model_chunks, args.save_merged)


def _write_merged(model_chunks: Sequence[torch.nn.Module], directory: str) -> None:
    """Save the merged model, whole or not at all. All ranks must call it."""
    # Rank 0 alone makes the directory, and gives it its place.
    made: list[WholeDirectory] = []

    def begin() -> Path:
        made.append(WholeDirectory(directory, overwrite=True, name="save_merged"))
        with made[0].telling():
            return made[0].begin()

    def finish() -> None:
        with made[0].telling():
            made[0].finish()

    try:
        save_merged(model_chunks, on_all_ranks(begin, only=0))
        on_all_ranks(finish, only=0)
    except BaseException:
        for whole in made:
            whole.drop()
        raise


def outputs_have_to_wait(args: argparse.Namespace) -> bool:
    """Say whether a signal ended the training and its checkpoint is what there is time for.

    After SIGTERM a scheduler kills within seconds. Without --save the outputs are all that is left.
    """
    if not args.save or not args.exit_signal_handler:
        return False
    return any(cast(Any, get_signal_handler()).signals_received())


def say_how_to_write(args: argparse.Namespace, config: LoRAConfig) -> None:
    """Print, on rank 0, by which commands the outputs come from the checkpoint in --save."""
    if args.rank != 0 or not (args.export_hf or args.save_merged):
        return
    flags = [flag for flag in ("export_hf", "save_merged") if getattr(args, flag)]
    iteration = read_iteration(Path(args.save)) if args.save else None
    if iteration is None:
        print(f"> LoRA: stopped without a checkpoint: no {' and no '.join(flags)}", flush=True)
        return
    print(
        f"> LoRA: stopped by a signal at iteration {iteration}: {' and '.join(flags)} not written. "
        f"Start again to go on from {args.save}; to have them of this iteration, start again with "
        f"--load {args.save} --train-iters {iteration} --override-opt-param-scheduler",
        flush=True,
    )
    if args.export_hf and config.init != "pissa":
        command = ["megalora", "export", args.save, "--output", args.export_hf]
        command += ["--export-for", args.export_for] if args.export_for else []
        command += ["--format", args.export_format] if args.export_format else []
        command += ["--hf-model", args.hf_model] if args.hf_model else []
        print(f"> LoRA: or: {shlex.join(command)}", flush=True)


def _check_writable(flag: str, directory: str) -> None:
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "cannot be written to" if place.is_dir() else "is a file"
        raise ValueError(f"{flag} {directory!r}: {place} {what}: give another directory")
