"""One training run from flags to exports: its phases, in their order.

`megalora.launch.LoRARun` calls them and keeps what one hands to the next.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training import print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megalora import replace
from megalora.arguments import given_lora_fields, lora_config_from_args
from megalora.builder import apply_lora
from megalora.checkpoint import lock
from megalora.checkpoint.base import differences, fingerprint, load_base
from megalora.checkpoint.find import Found, find_on_all_ranks
from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.schedule import stored_rates
from megalora.checkpoint.state import check_same_adapters, describe_base, describe_model
from megalora.checkpoint.unpickle import check_readable
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.exchange import load_adapter
from megalora.hf.rotary import set_rotary_of_flags
from megalora.mends import latent_attention
from megalora.ops import backend
from megalora.progress import Progress
from megalora.training import agree, fingerprints, inside, patches
from megalora.training.changes import before_building, before_loading, change_args
from megalora.training.flags import check_flags, check_same_optimizer
from megalora.training.outputs import (
    check_outputs,
    outputs_have_to_wait,
    say_how_to_write,
    write_outputs,
)
from megalora.training.replicas import check_replicas
from megalora.training.trust import check_trust
from megalora.training.vocabulary import base_sizes, rows_in_softmax

ModelChunks = list[torch.nn.Module]
# What a checkpoint stores with its adapters, or says of a base.
Description = Mapping[str, Any]


def start(args: argparse.Namespace) -> LoRAConfig | None:
    """Check a run's flags and make Megatron ready; return the adapters' configuration, if any.

    Raises ValueError where the flags cannot be right, before anything is built.
    """
    config = lora_config_from_args(args)
    if config is not None:
        check_trust(args)
    check_flags(args, config)
    if config is not None:
        check_ops(config.ops)
    if args.hf_model:
        replace.install(latent_attention.HUGGING_FACE)
    change_args(args, before_building(args, config))
    if config is not None:
        patches.install(patches.TRAINING)
        inside.INSIDE.interval = args.lora_log_interval
        if args.save:
            check_readable(args)
    return config


def check_ops(name: str) -> None:
    """Raise ValueError where the ops of adapters are not built, or for another torch."""
    try:
        backend(name)
    except ImportError as error:
        raise ValueError(str(error)) from error


def model_config(args: argparse.Namespace) -> Any:
    """Return Megatron's configuration of the model that flags describe, GPT or hybrid."""
    if args.hybrid_layer_pattern:
        return hybrid_config_from_args(args)
    config = gpt_config_from_args(args)
    # Megatron leaves this flag out: Llama 3.2 needs 32, the default is 8.
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def prepare(
    model_chunks: ModelChunks, args: argparse.Namespace, config: LoRAConfig | None
) -> LoRAConfig | None:
    """Load the base and attach the adapters, with what they start from; all ranks must call it.

    Returns the configuration that they have: a resumed run knows it only now. What Megatron itself
    then loads is an adapter checkpoint in --load, where there is one.
    """
    check_way(model_chunks, args)
    if config is not None and args.save:
        on_all_ranks(lambda: lock.take(args.save), only=0)
    found = find_checkpoint(args, config)
    check_sources(args, found)
    if config is None:
        if args.hf_model:
            load_from_hf(model_chunks, args.hf_model)
        return None
    description = found.description if found else None
    config = resolve_config(args, description)
    if description is not None:
        check_same_optimizer(args, description)
    base = load_own_base(model_chunks, args, found)
    if not args.data_parallel_random_init or base["source"]:
        check_replicas(model_chunks)
    if description is not None:
        check_base(description.get("base"), base, args)
    sizes = base_sizes(args, base["source"])
    change_args(args, {"vocab_size": sizes["vocab_size"]})
    apply_lora(model_chunks, config, vocab_size=rows_in_softmax(args))
    describe_base(model_chunks, base)
    describe_model(model_chunks, sizes)
    if description is None and args.lora_load:
        base_of_it = {"hf_model": args.hf_model, "vocab_size": args.vocab_size}
        load_adapter(model_chunks, args.lora_load, config, **base_of_it)
    change_args(args, stored_rates(args, description and description["schedule"]))
    change_args(args, before_loading(args, description))
    check_outputs(model_chunks, args, config)
    report(model_chunks)
    return config


def check_way(model_chunks: ModelChunks, args: argparse.Namespace) -> None:
    """Raise ValueError where a script builds another kind of model than its flags are for."""
    is_hybrid = any(hasattr(chunk, "hybrid_layer_pattern") for chunk in model_chunks)
    if args.hybrid_layer_pattern and not is_hybrid:
        raise ValueError(
            f"hybrid_layer_pattern is {args.hybrid_layer_pattern!r}, but this script builds a "
            "GPTModel: run one that builds a HybridModel, as pretrain_hybrid.py does"
        )
    if args.hf_model and is_hybrid and not args.hybrid_layer_pattern:
        raise ValueError(
            "hybrid_layer_pattern is missing, but this script builds a HybridModel: add --hybrid "
            "to --hf-model, or run a script that builds a GPTModel"
        )


def find_checkpoint(args: argparse.Namespace, config: LoRAConfig | None) -> Found | None:
    """Return the checkpoint in --load that the run goes on from.

    Raises ValueError where it holds what this run cannot go on from.
    """
    found = find_on_all_ranks(
        args.load, step=args.ckpt_step, on_corrupt=args.lora_on_corrupt, warn=print_rank_0
    )
    if found is None and args.load and args.load != args.save:
        print_rank_0(f"WARNING: load {args.load!r} holds no checkpoint: training starts anew")
    description = found.description if found else None
    if description is not None and config is None:
        rank = description["config"]["rank"]
        raise ValueError(
            f"load {args.load!r} holds LoRA adapters of rank {rank}: set --lora-rank {rank} to "
            "go on with them, or give another --load directory"
        )
    if description is not None and args.finetune:
        raise ValueError(
            f"load {args.load!r} holds adapters, which --finetune cannot start from: give the "
            "directory by --lora-load, and the base by --pretrained-checkpoint"
        )
    if found and description is None and config is not None and not args.finetune:
        raise ValueError(
            f"load {args.load!r} holds a whole model, which an adapter run cannot resume: give "
            "the directory by --pretrained-checkpoint, or add --finetune"
        )
    return found


def check_sources(args: argparse.Namespace, found: Found | None) -> None:
    """Raise ValueError on all ranks where one reads other files than rank 0."""
    flags = ("hf_model", "pretrained_checkpoint", "lora_load")
    sources = {flag: getattr(args, flag) for flag in flags}
    fields = fingerprints.of_sources({**sources, "load": found and found.directory})
    agree.check(fields, "give every node the same files")


def resolve_config(args: argparse.Namespace, description: Description | None) -> LoRAConfig:
    """Return the configuration of the flags; those left out come from the checkpoint.

    description: what the checkpoint stores; None for a new run, whose flags have defaults. Raises
    ValueError where a flag contradicts the checkpoint, naming it.
    """
    given = {**given_lora_fields(args), "rank": args.lora_rank}
    if description is None:
        return LoRAConfig(**given)
    stored = {name: value for name, value in description["config"].items() if name != "ops"}
    config = LoRAConfig.from_dict({**stored, **given})
    check_same_adapters(description, {**description, "config": config.to_dict()})
    return config


def load_own_base(
    model_chunks: ModelChunks, args: argparse.Namespace, found: Found | None
) -> dict[str, Any]:
    """Load the base that the flags name; return where it is from and by what it is known again."""
    whole_model = found is not None and found.description is None
    source = args.hf_model or (args.load if whole_model else args.pretrained_checkpoint)
    if args.hf_model:
        load_from_hf(model_chunks, args.hf_model)
    elif source:
        step = args.ckpt_step if whole_model else None
        with Progress("loading the base"):
            load_base(model_chunks, source, args, step=step, is_verified=whole_model)
        for chunk in model_chunks:
            set_rotary_of_flags(chunk, args)
    resolved = str(Path(source).resolve()) if source else None
    return {"source": resolved, **fingerprint(model_chunks)}


def load_from_hf(model_chunks: ModelChunks, directory: str) -> None:
    """Load a Hugging Face directory, and say how far that is."""
    total = sum(1 for chunk in model_chunks for _ in chunk.parameters())
    with Progress("loading the base", total, "tensors") as progress:
        load_hf_base(model_chunks, directory, progress=progress.add)


def check_base(stored: Description | None, own: Description, args: argparse.Namespace) -> None:
    """Raise ValueError where this base is not the one that the adapters were trained on."""
    if stored is None:
        print_rank_0("WARNING: checkpoint does not say which base its adapters were trained on")
        return
    wrong = differences(stored, own)
    if not wrong:
        return
    source = stored.get("source") if isinstance(stored, Mapping) else None
    trained_on = source or "start values that this model does not have"
    message = (
        f"base is {own['source'] or 'not given, so it has random start values'}, but the "
        f"adapters of load {args.load!r} were trained on {trained_on}: "
        f"{'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
    )
    if not args.lora_allow_other_base:
        raise ValueError(
            f"{message}. Give that base by --pretrained-checkpoint or --hf-model, or set "
            "--lora-allow-other-base"
        )
    print_rank_0(f"WARNING: {message}")


def report(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Print how much is trained and how much is frozen."""
    trained = sum(
        p.numel() for chunk in model_chunks for p in chunk.parameters() if p.requires_grad
    )
    frozen = sum(p.numel() for chunk in model_chunks for p in chunk.parameters()) - trained
    print_rank_0(
        f"> LoRA: {trained:,} trained parameters on this rank beside {frozen:,} frozen ones "
        f"({trained / max(1, trained + frozen):.2%})"
    )


def finish(
    model_chunks: ModelChunks, args: argparse.Namespace, config: LoRAConfig | None, *, early: bool
) -> None:
    """Write what --export-hf and --save-merged ask for; after a signal, say how to get it.

    early: Megatron ended the script (see `megalora.launch.at_end`).
    """
    is_trained = hasattr(args, "curr_iteration") or not args.exit_on_missing_checkpoint
    if not model_chunks or config is None or (early and not is_trained):
        return
    # --exit-signal-handler-for-training has ended the process groups too.
    if early and (not torch.distributed.is_initialized() or outputs_have_to_wait(args)):
        say_how_to_write(args, config)
    else:
        write_outputs(model_chunks, args, config)
