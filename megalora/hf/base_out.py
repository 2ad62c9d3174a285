"""A Megatron base, on any parallel layout, written as a Hugging Face directory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.adapters.world import first_rank
from megalora.checkpoint.ranks import on_all_ranks
from megalora.hf.base import parameters, replicas_of, weights_of
from megalora.hf.built import check_built_for
from megalora.hf.cuts import Piece
from megalora.hf.directories import whole_directory
from megalora.hf.factors import summarise
from megalora.hf.files import MODEL, save_tensors, write_json
from megalora.hf.rotary import rope_theta, yarn_of
from megalora.hf.stacked_weights import stacked
from megalora.hf.weights import EXPERT_BIAS
from megalora.model.config_json import LAYER_KINDS, mapped_family
from megalora.model.delta_net import delta_fields
from megalora.model.experts import expert_fields
from megalora.model.families import FAMILIES
from megalora.model.family import Family
from megalora.model.hybrid import config_of, layers_of, pattern_in, windows_of
from megalora.model.latent import latent_fields
from megalora.model.layer_kinds import hybrid_fields
from megalora.model.loaded import without_quantisation
from megalora.model.multimodal import as_text_model
from megalora.model.rope import yarn_fields

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import MLATransformerConfig

# Where a family's are left out, none are written.
_PREDICTIONS = "num_nextn_predict_layers"
MAX_SHARD_BYTES = 5_000_000_000
Part = tuple[str, int, tuple[int, int] | None, Tensor]


def save_hf_base(
    model_chunks: "Sequence[GPTModel]",
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the base weights of a model as config.json and safetensors; all ranks must call it.

    config: of a supported family, such as `hf_config` makes; it must describe this model.
    dtype: of the files, None for the parameters' own; experts' bias stays in fp32, as transformers
        keeps it.
    Rank 0 receives the model layer by layer and holds no more than one shard beside it.
    Raises ValueError where config does not describe the model, and, with nothing written, where a
    weight is not finite in that precision.
    """
    for chunk in model_chunks:
        check_built_for(chunk, config)
    layers, names = _gather_layers(model_chunks, config), mapped_family(config).names
    if dist.get_rank() != 0:
        # The other ranks only send.
        for _ in layers:
            pass
        on_all_ranks(lambda: None, only=0)
        return
    with whole_directory(directory, overwrite=overwrite) as target:
        writer = ShardWriter(target, max_shard_bytes)
        for tensors in layers:
            for name, tensor in stacked(tensors, names).items():
                keeps_own = dtype is None or name.endswith(EXPERT_BIAS)
                writer.add(names.in_files(name), tensor if keeps_own else tensor.to(dtype))
        on_all_ranks(writer.check, only=0)
        writer.finish()
        first = next(iter(writer.dtypes))
        write_json(target / "config.json", _as_saved(config, first, model_chunks[0]))


def _as_saved(config: Mapping[str, Any], dtype: torch.dtype, chunk: "GPTModel") -> dict[str, Any]:
    """Return the config.json of what is written, of which the model's own may say otherwise."""
    saved = as_text_model(without_quantisation(config))
    # transformers 5 prefers its new spelling, earlier ones know the old one alone.
    saved.pop("dtype", None)
    family = mapped_family(config)
    if field := family.prediction_field or (_PREDICTIONS if _PREDICTIONS in saved else ""):
        saved[field] = chunk.config.mtp_num_layers or 0
    return {**saved, "torch_dtype": str(dtype).removeprefix("torch.")}


def hf_config(
    chunk: "GPTModel",
    *,
    model_type: str,
    vocab_size: int,
    max_position_embeddings: int | None = None,
) -> dict[str, Any]:
    """Return a config.json that describes a Megatron model as one of a family.

    vocab_size: without Megatron's padding.
    Raises ValueError where the family cannot describe the model.
    """
    family = _named_family(model_type)
    built = config_of(chunk)
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [family.architecture],
        "vocab_size": vocab_size,
        "hidden_size": built.hidden_size,
        "intermediate_size": built.ffn_hidden_size,
        "num_hidden_layers": built.num_layers,
        "num_attention_heads": built.num_attention_heads,
        "num_key_value_heads": built.num_query_groups or built.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_position_embeddings or chunk.max_sequence_length,
        family.epsilon_field: built.layernorm_epsilon,
        "tie_word_embeddings": chunk.share_embeddings_and_output_weights,
        **_family_fields(chunk, family),
    }
    if family.experts and built.num_moe_experts:
        config |= expert_fields(built, family.experts)
    mapped_family(config)
    check_built_for(chunk, config)
    return config


def _named_family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type is {model_type!r}: must be one of {known}")
    return FAMILIES[model_type]


def _family_fields(chunk: "GPTModel", family: Family) -> dict[str, Any]:
    """Return the fields that some families have and others do not."""
    built = config_of(chunk)
    fields: dict[str, Any] = {"attention_bias": family.bias}
    if family.hybrid:
        fields |= hybrid_fields(built, layers_of(pattern_in(chunk)))
    else:
        fields["rope_theta"] = rope_theta(chunk)
    if family.latent:
        fields |= latent_fields(cast("MLATransformerConfig", built), yarn_of(chunk))
    else:
        fields["head_dim"] = built.kv_channels
        yarn = yarn_of(chunk)
        # Where config.json says nothing, transformers may scale.
        if yarn or "rope_parameters" in family.defaults:
            fields |= yarn_fields(rope_theta(chunk), yarn)
    if family.delta_net:
        fields |= delta_fields(built)
    if family.prediction_field:
        fields[family.prediction_field] = built.mtp_num_layers or 0
    if family.qkv_bias_field not in ("", *family.refused):
        fields[family.qkv_bias_field] = bool(built.add_qkv_bias)
    if family.qk_norm_field:
        fields[family.qk_norm_field] = built.qk_layernorm
    if family.window_field:
        fields[family.window_field] = built.window_size and built.window_size[0] + 1
    if family.window_in_some:
        skipped = built.window_attn_skip_freq if built.window_size else [0] * built.num_layers
        windows = windows_of(skipped, built.num_layers)
        fields["layer_types"] = [LAYER_KINDS[own] for own in windows]
    if family.clamp_field:
        fields[family.clamp_field] = built.activation_func_clamp_value
    if family.partial_rotary:
        rotated = 2 * len(chunk.rotary_pos_emb.inv_freq)
        fields["partial_rotary_factor"] = rotated / built.kv_channels
    return fields


class ShardWriter:
    """Write tensors to model.safetensors, or to shards with an index where there are too many."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.dtypes: dict[torch.dtype, None] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        self._bad: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a shard that would grow too large is written first."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total += size
        self.dtypes[tensor.dtype] = None
        if not all_finite(tensor):
            self._bad.append(f"{name} as {tensor.dtype}")

    def check(self) -> None:
        """Raise ValueError where a tensor has NaN or infinities, its own or of its precision."""
        if self._bad:
            raise ValueError(
                f"base has NaN or infinite values in {summarise(self._bad)}: nothing is written"
            )

    def finish(self) -> None:
        """Write what is left, name the shards and write their index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.directory / f"{MODEL}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file_name = f"{MODEL}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.directory / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self.directory / f"{MODEL}.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_tensors(self._part(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def _gather_layers(
    model_chunks: "Sequence[GPTModel]", config: Mapping[str, Any]
) -> Iterator[dict[str, Tensor]]:
    """Yield the whole tensors of the embeddings, then of each layer, on rank 0; {} elsewhere."""
    own: dict[int | None, list[Part]] = {}
    for chunk in model_chunks:
        for name, param, layer, pieces in parameters(chunk, weights_of(chunk, config)):
            if _is_sender(chunk, name):
                own.setdefault(layer, []).extend(_parts(param, pieces))
    weights = weights_of(model_chunks[0], config)
    sizes = weights.expected()
    for layer in (None, *range(weights.num_layers)):
        tensors = _assemble(_on_rank_0(own.get(layer, [])), sizes)
        if layer is None:
            # A copy of the embedding is one in the files too.
            copies = weights.copies().items()
            tensors |= {copy: tensors[name].clone() for copy, name in copies if name in tensors}
        yield tensors


def _is_sender(chunk: "GPTModel", name: str) -> bool:
    """Say whether this rank is the first of those that hold the same parameter."""
    return replicas_of(chunk, name).rank() == 0


def _parts(param: Tensor, pieces: list[Piece]) -> Iterator[Part]:
    for piece in pieces:
        rows = param.detach()[piece.first : piece.first + piece.count].cpu().clone()
        if piece.more:
            rows = (rows.double() + piece.more).to(rows.dtype)
        yield piece.name, piece.hf_first, piece.columns, rows


def _on_rank_0(parts: list[Part]) -> Iterator[Part]:
    """Yield the parts that all ranks have on rank 0, a sender's at a time; nothing elsewhere.

    A gather of objects would need room there for as many of the largest as there are ranks.
    """
    has_parts, rank = bool(parts), dist.get_rank()
    while (sender := first_rank(has_parts)) is not None:
        told = [parts]
        if rank == sender:
            has_parts = False
            if rank:
                dist.send_object_list(told, 0)
        elif rank == 0:
            dist.recv_object_list(told, sender)
        if rank == 0:
            yield from told[0]


def _assemble(parts: Iterable[Part], sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for name, first, columns, rows in parts:
        if name not in whole:
            # NaN would show a part that no rank sent.
            whole[name] = torch.full(sizes[name], float("nan"), dtype=rows.dtype)
        target = whole[name][first : first + rows.shape[0]]
        (target if columns is None else target[:, slice(*columns)]).copy_(rows)
    return whole
