"""Merge an adapter into a Hugging Face directory, one shard in memory at a time."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.hf.block_scaled import PlainFiles
from megalora.hf.copies import copy_files, other_files
from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors, check_factors, summarise
from megalora.hf.files import read_json, save_tensors, write_json
from megalora.hf.head_rows import HEAD, check_head_rows
from megalora.hf.misfits import why_not
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.stacked_weights import projection_of
from megalora.hf.written import MANIFEST
from megalora.model.config_json import checked_config, load_config
from megalora.model.families import names_of
from megalora.model.fields import switch
from megalora.model.loaded import without_quantisation
from megalora.model.multimodal import as_untied, language_config

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|up_proj|down_proj)")


def merge_adapter(
    base: str | os.PathLike[str],
    factors: Mapping[str, LoRAFactors],
    output: str | os.PathLike[str],
    *,
    trained: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> bool:
    """Write a copy of a model directory with W + scale * B @ A; return whether it was untied.

    Files, names, precisions and the index are the base's, but for FP8 with block scales, which
    becomes bfloat16; sums are made in fp32. An adapter of a tied unembedding unties it.
    trained: whole tensors in place of the base's, by name; one of tied embeddings unties them too.
    progress: called with every file's name.
    Raises ValueError, with nothing written, where the adapter does not belong to the base, a weight
    of the base is not finite, or a sum is beyond its precision.
    """
    check_factors(factors)
    source = Path(base)
    config = without_quantisation(checked_config(load_config(source), source))
    weights, trained = HFWeights(source, names_of(str(config.get("model_type")))), trained or {}
    untie = _unties(config, {*factors, *trained})
    config = as_untied(config) if untie else config
    _check_fits(weights, factors, untie=untie)
    others = other_files(source, skip=_is_rewritten)
    with whole_directory(output, overwrite=overwrite, inputs={"--hf-model": source}) as target:
        total = 0
        for file_name in weights.files.file_names():
            tensors = _merged_file(weights, file_name, factors, trained, untie=untie)
            total += sum(t.nbytes for t in tensors.values())
            if tensors:  # nothing may be left of a file with an unembedding alone
                save_tensors(target / file_name, tensors)
            if progress:
                progress(file_name)
        copy_files(others, target)
        write_json(target / "config.json", config)
        if weights.files.has_shards:
            _write_index(weights, target, total, untie=untie)
    return untie


def _unties(config: Mapping[str, Any], changed: set[str]) -> bool:
    of_unembedding = not changed.isdisjoint(("lm_head", _EMBEDDING, _UNEMBEDDING))
    config = language_config(config)
    return of_unembedding and switch(config, "tie_word_embeddings", default=False)


def _is_rewritten(name: str) -> bool:
    # Also the same weights in whatever other form: they would be those from before.
    return name.endswith(_WEIGHTS) or name in ("config.json", MANIFEST)


def _check_fits(weights: HFWeights, factors: Mapping[str, LoRAFactors], *, untie: bool) -> None:
    if untie and _EMBEDDING not in weights.shapes:
        raise ValueError(
            f"{weights.files.directory} is tied and has no {_EMBEDDING}, of which the adapter's "
            "lm_head unties it: load the base and save it by transformers once"
        )
    missing, wrong = [], []
    for name, module in factors.items():
        key = _EMBEDDING if untie and name == "lm_head" else f"{name}.weight"
        if key not in weights.shapes:
            missing.append(name)
            continue
        if name == HEAD:
            check_head_rows(factors, weights.shapes[key][0])
        shape = (module.lora_B.shape[0], module.lora_A.shape[1])
        if weights.shapes[key] != shape:
            wrong.append(f"{name} {list(shape)} (base {list(weights.shapes[key])})")
    if missing:
        raise ValueError(
            f"{weights.files.directory} has no weights for {summarise(missing)} of the adapter: "
            f"{why_not(missing, (key.removesuffix('.weight') for key in weights.shapes))}"
        )
    if wrong:
        raise ValueError(f"adapter has other sizes than its base: {summarise(wrong)}")


def _merged_file(
    weights: HFWeights,
    file_name: str,
    factors: Mapping[str, LoRAFactors],
    trained: Mapping[str, Tensor],
    *,
    untie: bool,
) -> dict[str, Tensor]:
    """Return the tensors of one file with the updates that belong to them."""
    names = [name for name, file in weights.files.files.items() if file == file_name]
    tensors: dict[str, Tensor] = {}
    for name in names:
        own = weights.files.tensor(name)
        known = weights.names.as_stored(name)
        tensor = trained[known].to(own.dtype) if known in trained else own
        fused = _FUSED.fullmatch(known)
        module = factors.get(known.removesuffix(".weight"))
        if fused:
            parts = weights.names.projections
            parts = parts[-1:] if fused.group(2) == weights.names.parameters[1] else parts[:-1]
            alternate = weights.names.interleaved
            _add_experts(tensor, fused.group(1), parts, factors, alternate=alternate)
        elif module is not None and not (untie and known == _UNEMBEDDING):
            add_update(tensor, module)
        if untie and known == _UNEMBEDDING:
            # A copy that a tied model carries along: the embedding's file writes it anew.
            continue
        tensors[name] = tensor.bfloat16() if weights.files.is_scaled(name) else tensor
        if untie and known == _EMBEDDING:
            head = trained.get(_UNEMBEDDING, own).to(own.dtype, copy=True)
            tensors[_UNEMBEDDING] = _updated(head, factors.get("lm_head"))
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            _refuse(weights, file_name, name, tensor.dtype)
    return tensors


def _refuse(weights: HFWeights, file_name: str, name: str, dtype: torch.dtype) -> NoReturn:
    """Raise ValueError for a merged tensor that is not finite, saying whose fault it is."""
    base = weights.stored(_EMBEDDING) if name not in weights.files else name
    path = weights.files.directory / file_name
    # NOTE: opened anew, for updates are added into the memory that the file was mapped to.
    if not all_finite(PlainFiles(weights.files.directory).tensor(base)):
        raise ValueError(f"{path}: {base} has NaN or infinite values: download the base again")
    raise ValueError(
        f"{path}: {name} plus its update is beyond {dtype}, whose largest number is "
        f"{torch.finfo(dtype).max:g}: the adapter was not trained on this base in this precision"
    )


def _add_experts(
    tensor: Tensor,
    prefix: str,
    parts: Sequence[str],
    factors: Mapping[str, LoRAFactors],
    *,
    alternate: bool,
) -> None:
    """Add the updates of all experts into one tensor of them that stacks parts.

    It is [E, P out, in]; alternate: [E, in, P out], and the features of the parts alternate.
    """
    count = len(parts)
    for expert, stacked in enumerate(tensor):
        for number, part in enumerate(parts):
            module = factors.get(f"{prefix}.{expert}.{part}")
            if module is not None:
                add_update(projection_of(stacked, number, count, alternate=alternate), module)


def _updated(weight: Tensor, module: LoRAFactors | None) -> Tensor:
    return weight if module is None else add_update(weight, module)


@torch.no_grad()
def add_update(weight: Tensor, module: LoRAFactors) -> Tensor:
    """Add scale * B @ A into a weight in place, the sum made in fp32; returns the weight."""
    return weight.copy_(module.delta().add_(weight))


def _write_index(weights: HFWeights, target: Path, total: int, *, untie: bool) -> None:
    index = read_json(weights.files.index)
    weight_map = dict(weights.files.files)
    if untie:
        weight_map[_UNEMBEDDING] = weight_map[weights.stored(_EMBEDDING)]
    metadata = index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    write_json(
        target / weights.files.index.name, {**index, "metadata": metadata, "weight_map": weight_map}
    )
