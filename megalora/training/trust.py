"""What a run of adapters does not do for a file or a flag: run code that comes with data."""

import argparse
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

_TRUE = ("1", "y", "yes", "true")
# Megatron gives these no word about remote code, and transformers then asks at the terminal.
_ASKING = ("SFTTokenizer", "MultimodalTokenizer")


def check_trust(args: argparse.Namespace) -> None:
    """Raise ValueError for flags and variables by which data could bring code, before it is read.

    args: Megatron's parsed flags, of a run with adapters.
    """
    if getattr(args, "trust_remote_code", False):
        raise ValueError(
            "trust_remote_code is set, which runs Python that comes with a tokenizer: leave out "
            "--trust-remote-code, and use the tokenizer's tokenizer.json"
        )
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower() in _TRUE:
        raise ValueError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets a checkpoint run code: unset it"
        )
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise ValueError(
            "non_persistent_ckpt_type is 'local', whose files are pickles that can run code: use "
            "'global', or --save-interval"
        )
    if getattr(args, "modelopt_enabled", False):
        raise ValueError(
            "modelopt_enabled is set, whose modelopt_state is a pickle that can run code: give a "
            "base without it, saved by Megatron in the format torch_dist"
        )


def check_spec(spec: Sequence[str] | None, given: Sequence[str] | None) -> None:
    """Raise ValueError where a checkpoint's flags name Python to import that the user did not.

    spec: --spec after --use-checkpoint-args. given: of the command line.
    """
    if spec is None or spec == given or str(spec[0]).startswith("megatron.core."):
        return
    raise ValueError(
        f"spec is {list(spec)} in the checkpoint that --use-checkpoint-args reads, which this run "
        f"would import: give --spec {' '.join(spec)} if that is what you mean, or leave out "
        "--use-checkpoint-args"
    )


def build_tokenizer(
    original: Callable[..., object], args: argparse.Namespace, **kwargs: object
) -> object:
    """Let a run without --tokenizer-type end in what to set: Megatron lists its own kinds only.

    And let a run of adapters not run the Python that a tokenizer brings.
    """
    if args.tokenizer_type is None:
        bytes_too = ", or --byte-tokenizer, which needs no files"
        raise ValueError(
            "tokenizer_type is not given: set --tokenizer-type HuggingFaceTokenizer and "
            f"--tokenizer-model DIR{bytes_too if hasattr(args, 'byte_tokenizer') else ''}"
        )
    if not getattr(args, "lora_rank", 0):
        return original(args, **kwargs)
    check_trust(args)
    return _without_asking(lambda: original(args, **kwargs), args.tokenizer_type)


def _without_asking[R](build: Callable[[], R], tokenizer_type: str) -> R:
    """Return what builds a tokenizer; a file that brings Python is a ValueError, not a question."""
    if tokenizer_type not in _ASKING:
        return build()
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    before, dynamic.TIME_OUT_REMOTE_CODE = dynamic.TIME_OUT_REMOTE_CODE, 0
    try:
        return build()
    finally:
        dynamic.TIME_OUT_REMOTE_CODE = before
