"""What a run of adapters does not do for a file or a flag: run code that comes with data."""

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megalora.training.needed import said_by_megatron

_TRUE = ("1", "y", "yes", "true")
_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json"),
    *("vocab.txt", "tekken.json", "tiktoken.model", "tokenizer.tiktoken", "merges.txt"),
}
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
    is_adapters = bool(getattr(args, "lora_rank", 0))
    if is_adapters:
        check_trust(args)
    with _saying_what_is_wrong(args.tokenizer_type, args.tokenizer_model):
        if not is_adapters:
            return original(args, **kwargs)
        return _without_asking(lambda: original(args, **kwargs), args.tokenizer_type)


@contextlib.contextmanager
def _saying_what_is_wrong(tokenizer_type: str, tokenizer_model: str | None) -> Iterator[None]:
    """Raise ValueError in a sentence for a tokenizer of Hugging Face's that is not there."""
    if tokenizer_type != "HuggingFaceTokenizer":
        yield
        return
    if tokenizer_model is None:
        raise ValueError(
            "tokenizer_model is not given: set --tokenizer-model to the directory of a Hugging "
            "Face model, which has its tokenizer.json"
        )
    is_directory = os.path.isdir(tokenizer_model)
    if is_directory and not _TOKENIZER_FILES & set(os.listdir(tokenizer_model)):
        raise ValueError(
            f"tokenizer_model {tokenizer_model!r} has no tokenizer.json: give the directory that "
            "has it, or copy it there"
        )
    try:
        yield
    except ValueError as error:
        if not said_by_megatron(error):
            raise
        is_path = tokenizer_model.startswith((".", "/", "~")) or tokenizer_model.count("/") > 1
        if is_path and not os.path.exists(tokenizer_model):
            raise ValueError(
                f"tokenizer_model {tokenizer_model!r} does not exist: give the directory of a "
                "Hugging Face model, which has its tokenizer.json"
            ) from error
        said = " ".join(str(error).replace("\\n", " ").split())
        raise ValueError(
            f"tokenizer_model {tokenizer_model!r} cannot be read ({said}): give a directory with "
            "tokenizer.json and tokenizer_config.json, or a name on the hub that can be reached"
        ) from error


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
