"""What a plan leaves alone: files of the cluster that are not here, and all that a run would write.

What is on this machine is checked as in a run; what is not is left out, and said.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training import arguments, ft_integration, global_vars, initialize, training

from megalora import cpu, launch
from megalora.checkpoint import find, lock
from megalora.data import arguments as data_arguments
from megalora.plan.script import nothing
from megalora.replace import Patch, around
from megalora.training import alarm, outputs, session

# By the names of the parsed flags: what a run reads.
_READ = (
    *("load", "pretrained_checkpoint", "lora_load", "data_path", "train_data_path"),
    *("valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path"),
    *("tokenizer_model", "vocab_file", "merge_file", "dataset"),
)
# What a run writes beside checkpoints while it builds, and what would ask for it.
_OFF: dict[str, object] = {
    "dump_param_to_param_group_map": None,
    "logits_save_dir": None,
    "record_memory_history": False,
}


class Untouched:
    """A rank's patches of what reads and writes files, and what they have left out."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def patches(self) -> tuple[Patch, ...]:
        """Return the table; `nothing` stands where something is only written or sent."""
        silent = (
            (alarm, "start", ("environ",), "there is one process"),
            # The run is for GPUs.
            (cpu, "installed", (), "a script may ask"),
            (cpu, "install_if_wanted", ("argv",), "a script may ask"),
            (launch, "check_gpu", ("num_gpus",), "the GPUs are the cluster's"),
            (lock, "take", ("directory",), "nothing is saved"),
            (find, "_go_back", ("root", "iteration"), "nothing is saved"),
            (outputs, "_check_writable", ("flag", "directory"), "its place is on the cluster"),
            (global_vars, "_set_tensorboard_writer", ("args",), "nothing is logged"),
            (global_vars, "_set_wandb_writer", ("args",), "nothing is logged"),
            (global_vars, "_set_one_logger", ("args",), "nothing is logged"),
            (global_vars, "_set_adlr_autoresume", ("args",), "nothing is resumed"),
            (initialize, "_compile_dependencies", (), "it compiles inside Megatron's folder"),
            (initialize, "init_persistent_async_worker", ("rank",), "nothing is saved"),
            (initialize, "_initialize_tp_communicators", (), "TransformerEngine's, of a GPU"),
            (training, "append_to_progress_log", ("save_dir",), "nothing is logged"),
            (ft_integration, "setup", (), "there is one process"),
            (session, "check_base", ("stored", "own"), "a base's numbers are not read"),
        )
        return (
            *(
                Patch(owner, name, needs, around(nothing), why)
                for owner, name, needs, why in silent
            ),
            Patch(training, "load_checkpoint", ("ddp_model",), around(_from_the_start), "shapes"),
            Patch(session, "find_on_all_ranks", ("load",), around(_find), "one process"),
            Patch(session, "load_adapter", ("directory",), around(self._adapter), "one process"),
            Patch(arguments, "validate_args", ("args",), around(self._validate), "not here"),
            Patch(global_vars, "build_tokenizer", ("args",), around(self._tokenizer), "not here"),
            Patch(
                data_arguments, "check_dataset", ("tokenizer",), around(self._dataset), "not here"
            ),
        )

    def _validate(
        self,
        original: Callable[..., argparse.Namespace],
        args: argparse.Namespace,
        *more: object,
        **named: object,
    ) -> argparse.Namespace:
        gone = {flag: path for flag in _READ if (path := _gone(getattr(args, flag, None)))}
        if gone:
            said = ", ".join(f"--{flag.replace('_', '-')} {path}" for flag, path in gone.items())
            self.notes.append(f"not on this machine, so not checked: {said}")
        if args.use_checkpoint_args and gone.keys() & {"load", "pretrained_checkpoint"}:
            raise ValueError(
                "use_checkpoint_args takes flags from a checkpoint that is not on this machine: "
                "give them on the command line"
            )
        vars(args).update(_OFF)
        if "lora_load" in gone:
            args.lora_load = None
        return original(args, *more, **named)

    def _tokenizer(
        self, original: Callable[..., object], args: argparse.Namespace, **named: object
    ) -> object:
        """Build the tokenizer; one that is not here by the size of its vocabulary alone."""
        files = ("tokenizer_model", "vocab_file", "merge_file")
        missing = [flag for flag in files if _gone(getattr(args, flag, None))]
        if not missing:
            return original(args, **named)
        if not args.vocab_size:
            raise ValueError(
                f"{missing[0]} {getattr(args, missing[0])!r} is not on this machine: add "
                "--vocab-size, the rows of its vocabulary, for this plan"
            )
        given = {name: getattr(args, name) for name in ("tokenizer_type", *files)}
        vars(args).update(dict.fromkeys(files), tokenizer_type="NullTokenizer")
        try:
            return original(args, **named)
        finally:
            vars(args).update(given)

    def _dataset(
        self, original: Callable[..., None], dataset: str, *more: object, **named: object
    ) -> None:
        if not _gone(dataset):
            original(dataset, *more, **named)

    def _adapter(
        self,
        original: Callable[..., None],
        chunks: object,
        directory: str,
        *more: object,
        **named: object,
    ) -> None:
        # In a run rank 0 alone reads it too, and tells the others.
        if os.environ["RANK"] == "0":
            original(chunks, directory, *more, **named)


def _gone(value: object) -> str:
    """Return the path in a flag's value that is not here, an empty text where all are."""
    words = value if isinstance(value, list | tuple) else [value]
    for word in words:
        # Blends have weights between their paths; prefixes of indexed data have two files.
        if isinstance(word, str) and not _is_number(word) and not _is_here(word):
            return word
    return ""


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def _is_here(path: str) -> bool:
    if path.startswith("stdlib-"):
        return True
    return Path(path).exists() or Path(f"{path}.idx").exists()


def _from_the_start(original: object, *args: object, **kwargs: object) -> tuple[int, int]:
    return 0, 0


def _find(original: object, load: str | None, **named: Any) -> find.Found | None:
    """Look for a checkpoint on this rank, as rank 0 does for all."""
    return find.find_checkpoint(load, **named) if load else None
