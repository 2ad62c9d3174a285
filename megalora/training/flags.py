"""The flags of a run beside --lora-*: bases and adapters in, adapters out, their checkpoints."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalora import cpu
from megalora.model.config_json import read_config
from megalora.model.megatron import megatron_flags
from megalora.replace import replace_once
from megalora.training.auto_lr import add_auto_lr_args


def add_exchange_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that bring base weights and adapters in and take adapters out.

    Also guards what Megatron does right after parsing: it follows --use-checkpoint-args, asks for
    --save-interval, and makes the tokenizer.
    """
    from megalora.checkpoint.find import guard_checkpoint_args
    from megalora.checkpoint.save import save_last_by_default

    guard_checkpoint_args()
    save_last_by_default()
    guard_tokenizer()
    group = parser.add_argument_group("exchange", "with Hugging Face directories")
    add = group.add_argument
    add("--hf-model", help="directory with config.json and safetensors: builds and loads the base")
    add("--lora-load", help="PEFT directory or adapter checkpoint to start from: weights only")
    add("--export-hf", help="directory to write the adapter to after training, in PEFT's format")
    add("--export-format", default="peft", choices=("peft", "uniform", "peft-3d"))
    group = parser.add_argument_group(
        "adapter checkpoints", "--save and --load hold adapters and their optimizer, never the base"
    )
    add = group.add_argument
    add(
        "--save-merged",
        help="directory to save an ordinary Megatron checkpoint in after training: W + c B A",
    )
    add(
        "--lora-on-corrupt",
        choices=("previous", "stop"),
        default="previous",
        help="a damaged newest checkpoint: go on from the one before (default), or stop",
    )
    add(
        "--lora-allow-other-base",
        action="store_true",
        help="warn, instead of stopping, where the base is not the one the adapter was trained on",
    )
    add_auto_lr_args(parser)
    return parser


def guard_tokenizer() -> None:
    """Let a run without --tokenizer-type end in what to set: Megatron lists its own kinds only.

    A second call does nothing.
    """
    from megatron.training import global_vars

    def build_tokenizer(original: Callable[..., Any], args: Any, **kwargs: Any) -> Any:
        if args.tokenizer_type is None:
            bytes_too = ", or --byte-tokenizer, which needs no files"
            raise ValueError(
                "tokenizer_type is not given: set --tokenizer-type HuggingFaceTokenizer and "
                f"--tokenizer-model DIR{bytes_too if hasattr(args, 'byte_tokenizer') else ''}"
            )
        return original(args, **kwargs)

    replace_once(global_vars, "build_tokenizer", build_tokenizer)


def with_hf_flags(argv: Sequence[str]) -> list[str]:
    """Return a command line with the Megatron flags of --hf-model's config.json before the user's.

    A flag that the user gives too keeps the user's value; where the model then has other sizes
    than config.json, loading its weights raises ValueError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hf-model")
    directory = parser.parse_known_args(argv)[0].hf_model
    if directory is None:
        return list(argv)
    return [*megatron_flags(read_config(directory)), *argv]


def refuse_fsdp(args: argparse.Namespace) -> None:
    """Raise ValueError for data parallelism that shards parameters.

    It cuts each parameter once more, into parts that adapters, their checkpoints and the loading of
    a base do not know.
    """
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name, False):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{name} is set, which adapters cannot be trained with: leave out {flag}; "
                "--use-distributed-optimizer shards the optimizer, and tensor, pipeline or expert "
                "parallelism the base"
            )


def check_checkpoint_args(args: argparse.Namespace) -> None:
    """Ask for what adapter checkpoints need, and for optimizer states of any layout."""
    if args.save and args.ckpt_format != "torch_dist":
        raise ValueError(
            f"ckpt_format is {args.ckpt_format!r}: adapters are saved as torch_dist, which loads "
            "on any parallel layout; leave --ckpt-format out"
        )
    if args.async_save and args.async_strategy == "nvrx" and cpu.installed():
        raise ValueError(
            "async_strategy is 'nvrx', which copies from a GPU: set --async-strategy mcore on the "
            "CPU"
        )
    if getattr(args, "init_model_with_meta_device", False):
        raise ValueError("init_model_with_meta_device is set: LoRA loads the base while building")
    if args.use_distributed_optimizer and args.non_persistent_ckpt_type != "local":
        # The states of adapters are small, and Megatron's default cannot change TP or PP.
        args.dist_ckpt_optim_fully_reshardable = True


def check_same_optimizer(args: argparse.Namespace, description: Mapping[str, Any]) -> None:
    """Raise ValueError where the states of a checkpoint's optimizer do not fit this run's kind.

    description: of `megalora.checkpoint.read.read_description`.
    """
    stored = description.get("distributed_optimizer")
    if args.no_load_optim or stored in (None, args.use_distributed_optimizer):
        return
    remedy = "add" if stored else "leave out"
    raise ValueError(
        f"use_distributed_optimizer is {args.use_distributed_optimizer} but the checkpoint in load "
        f"{args.load!r} was saved with {stored}, and Megatron cannot turn one's states into the "
        f"other's: {remedy} --use-distributed-optimizer, or set --no-load-optim to start the "
        "optimizer anew"
    )


def may_export_to(directory: Path) -> bool:
    """Say whether an export may replace a directory: nothing is there, or an earlier export."""
    if not directory.exists():
        return True
    return directory.is_dir() and (
        (directory / "adapter_config.json").is_file() or not any(directory.iterdir())
    )
