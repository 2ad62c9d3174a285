"""Adapters and merged weights between a running model and directories."""

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megalora.adapters.merge import merge
from megalora.adapters.pissa import at_start
from megalora.adapters.start import draw_uniform
from megalora.checkpoint.base import changed
from megalora.checkpoint.read import read_adapter_checkpoint
from megalora.checkpoint.state import gather_adapters, load_adapters, whole_shapes
from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.peft import CONFIG_NAME, read_adapter, write_adapter
from megalora.hf.servers import refusals
from megalora.model.config_json import family_of, read_config
from megalora.model.shape import ModelShape, refuse_hybrid

OUTPUT_B = "output_layer_lora.lora_B"


def load_into_model(
    model_chunks: Sequence[Any], directory: str | os.PathLike[str], config: LoRAConfig
) -> None:
    """Set a model's adapters from a PEFT directory or an adapter checkpoint: weights only.

    A PEFT directory may have a lower rank and fewer modules: the rest keeps its start values. An
    adapter checkpoint must have the same adapters. All ranks must call it. Raises ValueError where
    the directory does not fit the model.
    """
    path = Path(directory)
    if (path / CONFIG_NAME).is_file():
        shape = model_shape(model_chunks)
        factors = read_adapter(path, hidden_size=shape.hidden_size)
        tensors = from_hf(
            factors,
            config,
            shape,
            padded_vocab_size=_padded_vocab_size(model_chunks),
            fresh_a=draw_uniform,
        )
        load_adapters(model_chunks, tensors, allow_missing=True)
        return
    tensors, stored, _ = read_adapter_checkpoint(path)
    if stored.scale(stored.rank) != config.scale(config.rank):
        raise ValueError(
            f"lora_load {str(path)!r} was trained at scale {stored.scale(stored.rank):g}, this run "
            f"has {config.scale(config.rank):g}: set --lora-alpha {stored.alpha:g} and "
            f"--lora-rank {stored.rank}"
        )
    load_adapters(model_chunks, tensors)


def export_model(
    model_chunks: Sequence[Any],
    directory: str | os.PathLike[str],
    *,
    config: LoRAConfig,
    format: Literal["peft", "uniform", "peft-3d"] = "peft",
    base_model_name: str = "",
    vocab_size: int | None = None,
    hf_model: str | None = None,
) -> None:
    """Write a model's adapters as a PEFT directory, from rank 0. All ranks must call it.

    vocab_size: rows of the Hugging Face vocabulary; None keeps Megatron's padded ones.
    hf_model: directory of the base, whose family names the modules.
    """
    shape = model_shape(model_chunks, hf_model)
    tensors = gather_adapters(model_chunks)
    initial = None
    if config.init == "pissa":
        with at_start(model_chunks):
            initial = gather_adapters(model_chunks)
    if dist.get_rank() == 0:
        rows = tensors[OUTPUT_B].shape[0] if OUTPUT_B in tensors else 0
        shape = replace(shape, vocab_size=vocab_size or rows)
        write_adapter(
            directory,
            to_hf(tensors, config, shape, initial=initial),
            base_model_name=base_model_name,
            format=format,
            num_layers=shape.num_layers,
            num_experts=shape.num_moe_experts or None,
            moe_layers=shape.moe_layers or None,
            overwrite=True,
        )
        print(f"> LoRA: exported the adapter to {directory}", flush=True)
    dist.barrier()


def check_export(
    model_chunks: Sequence[Any], *, config: LoRAConfig, vocab_size: int, hf_model: str | None
) -> list[str]:
    """Raise ValueError where `export_model` would, and return what servers would refuse.

    It names and splits tensors of the adapters' shapes without values. All ranks must call it, and
    all raise the same.
    """
    whole = {
        name: torch.empty(shape, device="meta")
        for name, shape in whole_shapes(model_chunks).items()
    }
    shape = replace(model_shape(model_chunks, hf_model), vocab_size=vocab_size)
    factors = to_hf(whole, config, shape, initial=whole if config.init == "pissa" else None)
    return refusals(factors, vocab_size, family_of(read_config(hf_model)) if hf_model else None)


def save_merged(model_chunks: Sequence[Any], directory: str | os.PathLike[str]) -> None:
    """Merge the adapters and save the model as an ordinary Megatron checkpoint of weights.

    Any Megatron run starts from it by --pretrained-checkpoint or --load. The model stays merged.
    """
    from megatron.training import checkpointing, get_args

    merge(model_chunks)
    weights_only = {
        "save": str(directory),
        "no_save_optim": True,
        "no_save_rng": True,
        "async_save": False,
    }
    with changed(get_args(), weights_only), contextlib.ExitStack() as stack:
        for chunk in model_chunks:
            stack.enter_context(chunk.hide_loss_modules())
        # A release has no iteration: runs that load it start at 0.
        checkpointing.save_checkpoint(0, list(model_chunks), None, None, 0, release=True)


def model_shape(model_chunks: Sequence[Any], hf_model: str | None = None) -> ModelShape:
    """Return the sizes of a model that Hugging Face names depend on; ValueError for a hybrid.

    hf_model: directory of its base; where it is None, the names are those of most families.
    """
    refuse_hybrid(getattr(model_chunks[0], "hybrid_layer_pattern", None))
    sizes = vars(model_chunks[0].config)
    model_type = _model_type(hf_model) if hf_model else ""
    return ModelShape.from_mapping({**sizes, "vocab_size": 0, "model_type": model_type})


# Read when training starts: an export at its end must not fail because the base has gone.
@functools.cache
def _model_type(hf_model: str) -> str:
    return read_config(hf_model)["model_type"]


def _padded_vocab_size(model_chunks: Sequence[torch.nn.Module]) -> int | None:
    rows = {getattr(chunk, "vocab_size", None) for chunk in model_chunks} - {None}
    return rows.pop() if rows else None
