"""The flags of a run beside --lora-*: bases and adapters in, adapters out, their checkpoints."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megalora import cpu
from megalora.checkpoint.layout import base_directory, read_tracker
from megalora.config import LoRAConfig
from megalora.hf.cli import FORMAT_HELP
from megalora.hf.directories import check_place, relation_of
from megalora.hf.foreign import refuse_foreign
from megalora.hf.peft import FORMATS
from megalora.hf.servers import SERVERS, check_reader
from megalora.model.config_json import model_shape, read_config
from megalora.model.hybrid import layers_of, pattern_of, refuse_other
from megalora.model.megatron import megatron_flags
from megalora.targets import MLP, matching_target
from megalora.training.auto_lr import add_auto_lr_args
from megalora.training.log_flags import add_log_args


def add_exchange_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that bring base weights and adapters in and take adapters out; and --lr auto.

    The parser must have Megatron's own flags already, as the `extra_args_provider` of a script has.
    """
    group = parser.add_argument_group("Hugging Face", "where base and adapters come from, and go")
    add = group.add_argument
    add(
        "--hf-model",
        metavar="DIR",
        help="directory with config.json and safetensors: its sizes become Megatron's flags, and "
        "its weights are loaded, each rank's own part",
    )
    add(
        "--hybrid",
        action="store_true",
        help="build --hf-model as the HybridModel that equals it, with its --hybrid-layer-pattern",
    )
    add(
        "--lora-load",
        metavar="DIR",
        help="PEFT directory or adapter checkpoint to start from: its weights only, at iteration 0 "
        "with a new optimizer",
    )
    _add_export_args(group)
    _add_checkpoint_args(parser)
    add_log_args(parser)
    add_auto_lr_args(parser)
    return parser


def _add_export_args(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add(
        "--export-hf",
        metavar="DIR",
        help="directory to write the adapter to, for PEFT, after training or where --exit-interval "
        "or --exit-duration-in-mins ends it",
    )
    add(
        "--export-for",
        choices=tuple(SERVERS),
        help="who is to read --export-hf: chooses the format, and refuses what they would refuse",
    )
    add("--export-format", choices=FORMATS, help="of --export-hf, " + FORMAT_HELP)


def _add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "adapter checkpoints", "--save and --load hold adapters and their optimizer, never the base"
    )
    add = group.add_argument
    add(
        "--save-merged",
        metavar="DIR",
        help="directory to save an ordinary Megatron checkpoint in after training: weights "
        "W + c B A, no adapters",
    )
    add(
        "--lora-on-corrupt",
        choices=("previous", "stop"),
        default="previous",
        help="what to do where the newest checkpoint in --load is damaged: go on from the one "
        "before it, or stop (default previous)",
    )
    add(
        "--lora-allow-other-base",
        action="store_true",
        help="warn, instead of stopping, where the base is not the one the adapter was trained on",
    )


def refuse(message: str) -> NoReturn:
    """Raise as ValueError what argparse finds wrong."""
    raise ValueError(message)


def with_hf_flags(argv: Sequence[str]) -> list[str]:
    """Return a command line with the Megatron flags of --hf-model's config.json before the user's.

    A flag that the user gives too keeps the user's value; where the model then has other sizes
    than config.json, loading its weights raises ValueError. With --hybrid, or a pattern of the
    user's, they are those of a HybridModel.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--hf-model")
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--mtp-num-layers", type=int, default=0)
    given = parser.parse_known_args(argv)[0]
    if given.hf_model is None:
        return list(argv)
    own = given.hybrid_layer_pattern is not None
    flags = megatron_flags(
        read_config(given.hf_model),
        hybrid=given.hybrid or own,
        # The user's own pattern overrides this one.
        stages=1 if own else given.pipeline_model_parallel_size,
        predictions=given.mtp_num_layers,
    )
    return [*flags, *argv]


def check_flags(args: argparse.Namespace, config: LoRAConfig | None) -> None:
    """Raise ValueError where the flags of a run cannot be right, before anything is built."""
    if config is None:
        for flag in ("lora_load", "export_hf", "save_merged", "lora_log_interval"):
            if getattr(args, flag):
                raise ValueError(f"{flag} is {getattr(args, flag)!r} without LoRA: set --lora-rank")
    elif args.num_experts and _trains_experts(args, config):
        config.resolve_expert_rank(args.moe_router_topk)
    _check_bases(args)
    check_reader(args.export_for, args.export_format, export=args.export_hf)
    check_output_args(args)
    if config is not None:
        check_save(args)
        refuse_fsdp(args)
        check_checkpoint_args(args)


def _trains_experts(args: argparse.Namespace, config: LoRAConfig) -> bool:
    """Say whether the flags alone tell that experts have adapters, of whatever rank."""
    if args.lora_targets is None and args.load:
        # Those of the checkpoint in --load, where there is one.
        return False
    return any(
        matching_target(f"decoder.layers.{layer}.mlp.experts.{linear}", config.targets)
        for layer in range(args.num_layers or 0)
        for linear in MLP
    )


def _check_bases(args: argparse.Namespace) -> None:
    for flag in ("hf_model", "lora_load"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            raise ValueError(f"{flag} {path!r} does not exist: give an existing directory")
    if args.hf_model and Path(args.hf_model).is_file():
        raise ValueError(
            f"hf_model {args.hf_model!r} is a file: give its directory, which has the weights too"
        )
    if args.lora_load:
        refuse_foreign(args.lora_load, checkpoints=True)
    check_load(args)
    _check_pattern(args)
    if args.hf_model and args.pretrained_checkpoint:
        raise ValueError(
            f"hf_model {args.hf_model!r} and pretrained_checkpoint "
            f"{args.pretrained_checkpoint!r} are two bases: leave one of them out"
        )


def _check_pattern(args: argparse.Namespace) -> None:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if args.hybrid and not args.hf_model:
        raise ValueError("hybrid is set without hf_model: give --hf-model, whose layers it means")
    shape = model_shape(read_config(args.hf_model)) if args.hf_model else None
    if shape or args.export_hf:
        refuse_other(pattern, shape.model_type if shape else "")
    if shape and pattern:
        wanted = pattern_of(shape, predictions=pattern.count("/"))
        if layers_of(pattern) != wanted:
            raise ValueError(
                f"hybrid_layer_pattern is {pattern!r}, but hf_model {args.hf_model!r} has the "
                f"layers {wanted!r}: give these, with | between pipeline stages, or --hybrid alone"
            )


def check_load(args: argparse.Namespace) -> None:
    """Raise ValueError for directories in which Megatron would find nothing."""
    if args.load and read_tracker(Path(args.load)).newest is not None:
        # The base may be there too, and --pretrained-checkpoint not be read.
        return
    # One that is not here is left to the comparison of nodes, and of no matter to a plan.
    if args.pretrained_checkpoint and Path(args.pretrained_checkpoint).exists():
        base_directory(Path(args.pretrained_checkpoint))
    for file, flag in (("adapter_config.json", "--lora-load"), ("config.json", "--hf-model")):
        if args.load and (Path(args.load) / file).is_file():
            raise ValueError(
                f"load {args.load!r} has {file} and no checkpoint of Megatron's: give it by {flag}"
            )


def check_output_args(args: argparse.Namespace) -> None:
    """Raise ValueError for output directories that hold something else, or are read."""
    read = ("hf_model", "pretrained_checkpoint", "lora_load")
    outputs = [flag for flag in ("export_hf", "save_merged") if getattr(args, flag)]
    for flag in outputs:
        others = {other: getattr(args, other) for other in (*read, *outputs) if other != flag}
        check_place(getattr(args, flag), overwrite=True, inputs=others, name=flag)
        for other in ("save", "load"):
            path = getattr(args, other)
            # Below the checkpoints there may be more.
            if path and relation_of(getattr(args, flag), path) in ("also", "above"):
                raise ValueError(
                    f"{flag} {getattr(args, flag)!r} is the directory of {other} too, or above it: "
                    "give a new directory"
                )


def check_save(args: argparse.Namespace) -> None:
    """Raise ValueError where --save would hide, or mix its checkpoints with, those of another."""
    if not args.save:
        return
    for flag, relations in {
        "pretrained_checkpoint": ("also", "inside"),
        "hf_model": ("also", "inside"),
        "lora_load": ("also", "inside", "above"),
    }.items():
        source = getattr(args, flag)
        relation = relation_of(args.save, source) if source else ""
        if relation in relations:
            raise ValueError(
                f"save {args.save!r} is {relation} {flag} {source!r}, which checkpoints would "
                "change: give a directory of its own"
            )
    goes_on = args.load and relation_of(args.save, args.load) == "also"
    tracker = read_tracker(Path(args.save))
    if tracker.newest is not None and not goes_on:
        raise ValueError(
            f"save {args.save!r} holds checkpoints already (the newest is {tracker.newest}), which "
            f"this new run would mix with its own: add --load {args.save} to go on from them, or "
            "give another --save"
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
