"""All that reads a checkpoint without a run: each raises ValueError for one that it refuses."""

import argparse
import contextlib
import io
from pathlib import Path

from megalora.__main__ import main


def command(*words: object) -> None:
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in words])
    if status:
        raise ValueError(error.getvalue())


def export(directory: Path) -> None:
    command("export", directory, "--vocab-size", 255, "--output", directory.parent / "adapter")


def inspect(directory: Path) -> None:
    command("inspect", directory)


def read(directory: Path) -> None:
    from megalora.checkpoint.read import read_adapter_checkpoint

    read_adapter_checkpoint(directory)


def resume(directory: Path) -> None:
    from megalora.checkpoint.find import find_checkpoint

    # A damaged tracker file is no reason to stop, but to warn.
    warnings: list[str] = []
    found = find_checkpoint(directory, step=None, on_corrupt="previous", warn=warnings.append)
    assert found is not None
    if warnings:
        raise ValueError("\n".join(warnings))


def lora_load(directory: Path) -> None:
    from megalora.config import LoRAConfig
    from megalora.hf import exchange
    from megalora.hf.one_process import one_process

    exchange.load_adapters = lambda chunks, tensors: None
    with one_process():
        exchange.load_adapter([], directory, LoRAConfig(rank=8))


def base(directory: Path) -> None:
    from megalora.checkpoint.base import checkpointing, load_base
    from megalora.hf.one_process import one_process

    checkpointing.load_checkpoint = lambda *chunks, **options: None
    with one_process():
        load_base([], str(directory), argparse.Namespace())


READERS = {each.__name__: each for each in (export, inspect, read, resume, lora_load, base)}
