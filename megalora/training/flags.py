"""The flags of a run beside --lora-*: bases and adapters in, adapters out, their checkpoints."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalora import cpu
from megalora.config import LoRAConfig
from megalora.model.config_json import read_config
from megalora.model.megatron import megatron_flags
from megalora.model.shape import refuse_hybrid
from megalora.training.auto_lr import add_auto_lr_args


def add_exchange_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that bring base weights and adapters in and take adapters out; and --lr auto.

    The parser must have Megatron's own flags already, as the `extra_args_provider` of a script has.
    """
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


def check_flags(args: argparse.Namespace, config: LoRAConfig | None) -> None:
    """Raise ValueError where the flags of a run cannot be right, before anything is built."""
    if config is None:
        for flag in ("lora_load", "export_hf", "save_merged"):
            if getattr(args, flag):
                raise ValueError(f"{flag} is {getattr(args, flag)!r} without LoRA: set --lora-rank")
    elif args.num_experts:
        config.resolve_expert_rank(args.moe_router_topk)
    _check_bases(args)
    check_output_args(args)
    if config is not None:
        refuse_fsdp(args)
        check_checkpoint_args(args)


def _check_bases(args: argparse.Namespace) -> None:
    for flag in ("hf_model", "lora_load"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            raise ValueError(f"{flag} {path!r} does not exist: give an existing directory")
    for flag in ("hf_model", "export_hf"):
        if getattr(args, flag):
            refuse_hybrid(getattr(args, "hybrid_layer_pattern", None))
    if args.hf_model and args.pretrained_checkpoint:
        raise ValueError(
            f"hf_model {args.hf_model!r} and pretrained_checkpoint "
            f"{args.pretrained_checkpoint!r} are two bases: leave one of them out"
        )


def check_output_args(args: argparse.Namespace) -> None:
    """Raise ValueError for output directories that hold something else."""
    if args.export_hf and not may_export_to(Path(args.export_hf)):
        raise ValueError(
            f"export_hf {args.export_hf!r} exists and is no adapter: give a new directory"
        )
    for other in ("save", "load", "pretrained_checkpoint", "hf_model", "export_hf"):
        path = getattr(args, other)
        if args.save_merged and path and Path(path).resolve() == Path(args.save_merged).resolve():
            raise ValueError(
                f"save_merged {args.save_merged!r} is the directory of {other} too, whose "
                "checkpoints it would hide: give a new directory"
            )


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
    """Raise ValueError for what adapter checkpoints cannot be saved or loaded with."""
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
