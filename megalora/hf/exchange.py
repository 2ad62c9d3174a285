"""Adapters between a running model and directories: PEFT's, or a checkpoint to start from."""

import functools
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from megalora.adapters.pissa import at_start
from megalora.adapters.start import draw_uniform
from megalora.arguments import flags_of
from megalora.checkpoint.description import read_sizes
from megalora.checkpoint.gather import gather_adapters, load_adapters, whole_shapes
from megalora.checkpoint.layout import Sums, find_directory, verify
from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.read import read_adapters
from megalora.checkpoint.sums import with_all_ranks
from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.foreign import refuse_foreign
from megalora.hf.head_rows import check_head_rows
from megalora.hf.inspect import is_peft
from megalora.hf.peft import Format, read_adapter, write_adapter
from megalora.hf.servers import choose_format, judge_export, served_model
from megalora.hf.stacked_experts import check_shared
from megalora.hf.untrained import without_untrained
from megalora.model.config_json import load_config, mapped_family
from megalora.model.config_json import model_shape as config_shape
from megalora.model.families import names_of
from megalora.model.hybrid import Chunk, config_of, pattern_in, refuse_other
from megalora.model.shape import ModelShape

OUTPUT_B = "output_layer_lora.lora_B"


def load_adapter(
    model_chunks: Sequence[torch.nn.Module],
    directory: str | os.PathLike[str],
    config: LoRAConfig,
    *,
    hf_model: str | None = None,
    vocab_size: int = 0,
) -> None:
    """Set a model's adapters from a PEFT directory or an adapter checkpoint: weights only.

    A PEFT directory may have a lower rank and fewer modules: the rest keeps its start values. An
    adapter checkpoint must have the same adapters. All ranks must call it. Raises ValueError where
    the directory does not fit the model. hf_model: directory of the base, whose family names the
    modules of a PEFT directory.
    vocab_size: rows that the base has at least without Megatron's padding, 0 where unknown.
    """
    path = Path(directory)
    refuse_foreign(path, checkpoints=True)
    if is_peft(path):
        _load_peft(model_chunks, path, config, hf_model, vocab_size)
    else:
        _load_checkpoint(model_chunks, path, config)


def _load_peft(
    model_chunks: Sequence[torch.nn.Module],
    directory: Path,
    config: LoRAConfig,
    hf_model: str | None,
    vocab_size: int,
) -> None:
    shape, padded = model_shape(model_chunks, hf_model), _padded_vocab_size(model_chunks)
    names = names_of(shape.model_type)
    factors = read_adapter(directory, names=names, hidden_size=shape.hidden_size, base=hf_model)
    known = _vocab_size(hf_model) if hf_model else 0
    check_head_rows(factors, known or vocab_size, known or padded)
    if not shape.model_type:
        # The rows are what the run's tokenizer made of them: the adapter may know better.
        shape = replace(shape, vocab_size=0)
    tensors = from_hf(
        factors,
        config,
        shape,
        padded_vocab_size=padded,
        fresh_a=draw_uniform,
    )
    load_adapters(model_chunks, tensors, allow_missing=True)


def _load_checkpoint(
    model_chunks: Sequence[torch.nn.Module], directory: Path, config: LoRAConfig
) -> None:
    def intact(sums: Sums) -> Path:
        found = find_directory(directory)
        verify(found, sums)
        return found

    tensors, stored, _ = read_adapters(with_all_ranks(intact))
    if stored.scale(stored.rank) != config.scale(config.rank):
        raise ValueError(
            f"lora_load {str(directory)!r} was trained at scale {stored.scale(stored.rank):g}, "
            f"this run has {config.scale(config.rank):g}: set --lora-alpha {stored.alpha:g} and "
            f"--lora-rank {stored.rank}"
        )
    try:
        load_adapters(model_chunks, tensors)
    except ValueError as error:
        raise ValueError(
            f"lora_load {str(directory)!r} has other adapters than this run: {error}. It was made "
            f"with {shlex.join(flags_of(stored))}"
        ) from error


def export_adapter(
    model_chunks: Sequence[torch.nn.Module],
    directory: str | os.PathLike[str],
    *,
    config: LoRAConfig,
    format: Format | None = None,
    base_model_name: str = "",
    vocab_size: int | None = None,
    hf_model: str | None = None,
) -> None:
    """Write a model's adapters as a PEFT directory, from rank 0. All ranks must call it.

    Raises ValueError, on all ranks, where the adapters are not finite or cannot be written.
    vocab_size: rows of the Hugging Face vocabulary; None for those that `apply_lora` was told,
    which was told none for Megatron's padded ones.
    hf_model: directory of the base, whose family names the modules. format: None for PEFT's.
    """
    shape = model_shape(model_chunks, hf_model)
    chosen = choose_format(None, format, served_model(hf_model, shape), shares_outer=False)
    tensors = gather_adapters(model_chunks)
    initial = start_values(model_chunks) if config.init == "pissa" else None

    def write() -> None:
        rows = tensors[OUTPUT_B].shape[0] if OUTPUT_B in tensors else 0
        sizes = replace(shape, vocab_size=vocab_size or shape.vocab_size or rows)
        write_adapter(
            directory,
            without_untrained(to_hf(tensors, config, sizes, initial=initial)),
            base_model_name=base_model_name,
            format=chosen,
            names=names_of(sizes.model_type),
            num_layers=sizes.num_layers,
            num_experts=sizes.num_moe_experts or None,
            moe_layers=sizes.moe_layers or None,
            delta_layers=sizes.delta_layers,
            overwrite=True,
        )
        print(f"> LoRA: exported the adapter to {directory}", flush=True)

    on_all_ranks(write, only=0)


def start_values(model_chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return what the adapters started from, as `gather_adapters` does of what they are."""
    with at_start(model_chunks):
        return gather_adapters(model_chunks)


def check_export(
    model_chunks: Sequence[torch.nn.Module],
    *,
    config: LoRAConfig,
    vocab_size: int,
    hf_model: str | None,
    format: Format | None = None,
    server: str | None = None,
) -> tuple[Format, list[str]]:
    """Raise ValueError where `export_adapter` would, and where the server that it is for refuses.

    server: of `megalora.hf.servers.SERVERS`. Returns the format, which the server decides where
    none is given, and what the server needs, or what vLLM would refuse where no server is named.
    It names and splits tensors of the adapters' shapes without values. All ranks must call it, and
    all raise the same.
    """
    whole = {
        name: torch.empty(shape, device="meta")
        for name, shape in whole_shapes(model_chunks).items()
    }
    shape = replace(model_shape(model_chunks, hf_model), vocab_size=vocab_size)
    factors = to_hf(whole, config, shape, initial=whole if config.init == "pissa" else None)
    served = served_model(hf_model, shape)
    shares_outer = config.expert_mode == "shared_outer"
    format = choose_format(server, format, served, shares_outer=shares_outer)
    if format == "tinker":
        check_shared(factors, config)
    return format, judge_export(factors, format, served, server)


def model_shape(model_chunks: Sequence[torch.nn.Module], hf_model: str | None = None) -> ModelShape:
    """Return the sizes of a model that Hugging Face names depend on.

    Raises ValueError for a hybrid that is of no family and equals no GPT model.
    vocab_size: 0 where a model with adapters was not told it (`apply_lora`). hf_model: directory of
    its base; where it is None, the names are those of the family that the run found, or of most.
    """
    described = read_sizes(getattr(model_chunks[0], "megalora_description", {}))
    known = {"vocab_size": 0, **described}
    modules = (name for chunk in model_chunks for name, _ in chunk.named_modules())
    # What a configuration asks for, TransformerEngine's layers alone have.
    known["mla_down_proj_fusion"] = any(name.endswith("linear_qkv_down_proj") for name in modules)
    if hf_model:
        known["model_type"] = _model_type(hf_model)
    refuse_other(pattern_in(model_chunks[0]), known.get("model_type", ""))
    config = config_of(cast("Chunk", model_chunks[0]))
    return ModelShape.from_mapping({**vars(config), **known})


# Read when training starts: an export at its end must not fail because the base has gone.
@functools.cache
def _model_type(hf_model: str) -> str:
    return mapped_family(load_config(hf_model)).model_type


def _vocab_size(hf_model: str) -> int:
    return config_shape(load_config(hf_model)).vocab_size


def _padded_vocab_size(model_chunks: Sequence[torch.nn.Module]) -> int | None:
    rows = {getattr(chunk, "vocab_size", None) for chunk in model_chunks} - {None}
    return rows.pop() if rows else None
