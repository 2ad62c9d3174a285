"""LoRA in one training run: what a launch script calls between parsing flags and `pretrain`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from megalora import cpu, mends, quiet
from megalora.installed import check_megatron
from megalora.printable import printable
from megalora.replace import UnknownMegatronError
from megalora.training import alarm
from megalora.training.flags import add_exchange_args, with_hf_flags
from megalora.training.needed import check_gpu, check_training_args

# All that a launch script needs, from one module.
# NOTE: scripts import it before `prepare_megatron`: only functions import megatron.
__all__ = [
    "LoRARun",
    "add_exchange_args",
    "at_end",
    "check_training_args",
    "clear_errors",
    "prepare_megatron",
    "with_hf_flags",
]

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]
# What is said in one sentence, without the traceback.
_SAID = (ValueError, UnknownMegatronError)


class Finish(Protocol):
    """What is to be done once a run has ended, as `LoRARun.finish`."""

    def __call__(self, *, early: bool = False) -> None:
        """Finish; early: the script was left by sys.exit(0)."""
        ...


def prepare_megatron(argv: Sequence[str]) -> None:
    """Mend Megatron for the device of this run; to be called before megatron is imported.

    Also guards what Megatron does right after parsing: it follows --use-checkpoint-args, asks for
    --save-interval, and makes the tokenizer. argv: the run's flags, for --cpu. Ends the run where a
    rank was meant for a GPU and has none. From here on, a rank that fails ends all others.
    """
    with clear_errors():
        quiet.install()
        check_megatron()
        if not cpu.is_imported_again():
            alarm.start(os.environ)
        on_cpu = cpu.install_if_wanted(argv)
        alarm.compare("device", "cpu" if on_cpu else "cuda")
        if not on_cpu:
            check_gpu(torch.cuda.device_count())
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

    def model_config(self) -> Any:
        """Return Megatron's configuration of the model that the flags describe, with `hooks`."""
        config = self._session.model_config(self.args)
        config.pre_wrap_hooks += self.hooks()
        return config

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
def clear_errors() -> Iterator[None]:
    """End a script with one message where the user's input is wrong, and end all other ranks too.

    Whatever ends a rank is said by the first that it ends; what ends the others then is not.
    """
    try:
        yield
    except SystemExit as end:
        if end.code and not alarm.tell():
            raise SystemExit(end.code if isinstance(end.code, int) else 1) from None
        raise
    except BaseException as error:
        speaks = alarm.tell()
        sys.stdout.flush()
        if not speaks:
            raise SystemExit(1) from None
        if isinstance(error, _SAID) and not os.environ.get("MEGALORA_TRACEBACK"):
            raise SystemExit(f"error: {printable(error)}") from None
        raise
