"""LoRA in one training run: what a launch script calls between parsing flags and `pretrain`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from megalora import cpu, mends
from megalora.printable import printable
from megalora.training.flags import add_exchange_args, with_hf_flags

# All that a launch script needs, from one module.
# NOTE: scripts import it before `prepare_megatron`: only functions import megatron.
__all__ = [
    "LoRARun",
    "add_exchange_args",
    "at_end",
    "clear_errors",
    "prepare_megatron",
    "with_hf_flags",
]

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]


class Finish(Protocol):
    """What is to be done once a run has ended, as `LoRARun.finish`."""

    def __call__(self, *, early: bool = False) -> None:
        """Finish; early: the script was left by sys.exit(0)."""
        ...


def prepare_megatron(argv: Sequence[str]) -> None:
    """Mend Megatron for the device of this run; to be called before megatron is imported.

    Also guards what Megatron does right after parsing: it follows --use-checkpoint-args, asks for
    --save-interval, and makes the tokenizer. argv: the run's flags, for --cpu. Ends the run on a
    rank that was meant for a GPU and has none.
    """
    # Any rank may be the one, so it says so itself.
    with clear_errors(every_rank=True):
        cpu.install_if_wanted(argv)
    mends.install()
    from megalora.training import patches

    patches.install(patches.PARSING)


class LoRARun:
    """The adapters of one run, from flags to export.

    args: Megatron's parsed flags with those of `add_lora_args` and `add_exchange_args`.
    Raises ValueError where the flags cannot be right, before anything is built.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from megalora.training import session

        self._session = session
        self.args = args
        self.config = session.start(args)
        self.model: ModelChunks = []

    def hooks(self) -> list[Hook]:
        """Return the hooks for the `pre_wrap_hooks` of a model configuration."""
        return [self.prepare]

    def prepare(self, model_chunks: ModelChunks) -> ModelChunks:
        """Load the base, attach the adapters, load those that --lora-load names.

        What Megatron itself then loads is an adapter checkpoint in --load, where there is one.
        """
        self.config = self._session.prepare(model_chunks, self.args, self.config)
        self.model = [] if self.config is None else model_chunks
        return model_chunks

    def finish(self, *, early: bool = False) -> None:
        """Write what --export-hf and --save-merged ask for; after a signal, say how to get it.

        early: Megatron ended the script (see `at_end`).
        """
        self._session.finish(self.model, self.args, self.config, early=early)


@contextlib.contextmanager
def at_end(finish: Finish) -> Iterator[None]:
    """Call finish() after what trains, or finish(early=True) where it leaves by sys.exit(0).

    Megatron leaves so for --exit-interval, --exit-duration-in-mins and --exit-signal-handler.
    """
    try:
        yield
    except SystemExit as end:
        if not end.code:
            finish(early=True)
        raise
    finish()


@contextlib.contextmanager
def clear_errors(*, every_rank: bool = False) -> Iterator[None]:
    """End a script with one message where the user's input is wrong, on one rank of each node.

    every_rank: let every rank that fails say why.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        speaks = every_rank or os.environ.get("LOCAL_RANK", "0") == "0"
        message = f"error: {printable(error)}" if speaks else ""
        sys.stdout.flush()
        raise SystemExit(message or 1) from None
