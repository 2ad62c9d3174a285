"""Base weights between a Hugging Face directory and the chunks of a sharded Megatron model."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.checkpoint.ranks import on_all_ranks
from megalora.hf.factors import summarise
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Piece, Placement, Shard, Weights
from megalora.model.config_json import read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_args
from megalora.model.rope import rope
from megalora.model.shape import ModelShape
from megalora.targets import is_adapter_key

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

_LAYER = re.compile(r"decoder\.layers\.\d+")

# Megatron's argument -> field of TransformerConfig, where the names differ.
_FIELDS = {"num_experts": "num_moe_experts", "swiglu": "gated_linear_unit"}
# Arguments that a model may be built with as it likes.
_FREE = {
    "group_query_attention",
    "max_position_embeddings",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "use_rope_scaling",
    "rope_scaling_factor",
    "moe_layer_freq",
    "moe_router_load_balancing_type",
    "moe_token_dispatcher_type",
    "moe_router_dtype",
    "hidden_dropout",
    "attention_dropout",
}
# What a model has where its arguments say nothing, of options that change the computation.
_OTHERWISE = {
    "num_moe_experts": 0,
    "window_size": None,
    "window_attn_skip_freq": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": 0,
    "moe_shared_expert_gate": False,
}


@torch.no_grad()
def load_hf_base(
    model_chunks: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    progress: Callable[[str], object] | None = None,
) -> None:
    """Load a Hugging Face directory into model chunks, on any parallel layout.

    Each rank reads its own slices only, straight into its parameters. Adapters are left alone.
    Rotary frequencies are set from config.json, since Megatron's builder drops the scaling factor.
    progress: called with every parameter's name.
    Raises ValueError, before anything is changed, where the directory is broken or incomplete, or
    where the model was built with other sizes or options than its config.json has; and on all
    ranks, once all is read, where a rank's weights are not finite. All ranks must call it.
    """
    config = read_config(directory)
    files = HFWeights(directory, names_of(config["model_type"]))
    jobs = []
    chunks = cast("Sequence[GPTModel]", model_chunks)
    for chunk in chunks:
        check_built_for(chunk, config)
        weights = Weights(config, placement(chunk))
        files.check(weights.expected(), tied=weights.shape.tied_embeddings)
        for name, param, _, pieces in parameters(chunk, weights):
            _check_covered(name, param, pieces)
            jobs.append((name, param, pieces))
    problems: list[str] = []
    for name, param, pieces in jobs:
        filled = sum(piece.count for piece in pieces)
        param[filled:].zero_()
        for piece in pieces:
            part = files.read(piece.name, piece.hf_first, piece.count, piece.columns)
            param[piece.first : piece.first + piece.count].copy_(part)
        problems += _not_finite(param, pieces, files)
        if progress:
            progress(name)
    on_all_ranks(functools.partial(_refuse, problems))
    for chunk in chunks:
        _set_rotary_frequencies(chunk, config)


def _not_finite(param: Tensor, pieces: list[Piece], files: HFWeights) -> list[str]:
    """Return the pieces that a parameter has NaN or infinities from, after file and precision.

    The parameter is looked at, not the file: it may be on a GPU, and of another precision.
    """
    if all_finite(param):
        return []
    bad = [p for p in pieces if not all_finite(param[p.first : p.first + p.count])]
    return [f"{files.path(piece.name)}: {piece.name} as {param.dtype}" for piece in bad]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"base has NaN or infinite values in {summarise(problems)}: download it again; or its "
            "values are beyond this precision, and need --bf16"
        )


def placement(chunk: "GPTModel") -> Placement:
    """Return which parts of the weights this rank holds."""
    groups = chunk.pg_collection
    tp = Shard(groups.tp.rank(), groups.tp.size())
    if not chunk.config.num_moe_experts:
        return Placement(tp, Shard(), Shard())
    expert_tp = Shard(groups.expt_tp.rank(), groups.expt_tp.size())
    return Placement(tp, expert_tp, Shard(groups.ep.rank(), groups.ep.size()))


def parameters(
    chunk: "GPTModel", weights: Weights
) -> Iterator[tuple[str, Tensor, int | None, list[Piece]]]:
    """Yield every base parameter of a chunk with its global layer from 0 and its pieces."""
    numbers = {
        name: cast(int, module.layer_number) - 1
        for name, module in chunk.named_modules()
        if _LAYER.fullmatch(name)
    }
    tensors = [*chunk.named_parameters(), *_expert_biases(chunk)]
    for name, param in tensors:
        if is_adapter_key(name):
            continue
        found = _LAYER.match(name)
        layer = numbers[found.group(0)] if found else None
        yield name, param, layer, weights.pieces(name, layer, param.shape[0])


def _expert_biases(chunk: "GPTModel") -> list[tuple[str, Tensor]]:
    return [(n, buffer) for n, buffer in chunk.named_buffers() if n.endswith("router.expert_bias")]


def _check_covered(name: str, param: Tensor, pieces: list[Piece]) -> None:
    covered = sum(piece.count for piece in pieces)
    is_table = name.startswith(("embedding.", "output_layer."))
    widths = {p.columns[1] - p.columns[0] for p in pieces if p.columns}
    if (covered != param.shape[0] and not is_table) or (widths and widths != {param.shape[1]}):
        raise ValueError(
            f"Megatron parameter {name} has shape {list(param.shape)}, its config.json fills "
            f"{covered} rows: the model was built with other sizes"
        )


def check_built_for(chunk: "GPTModel", config: Mapping[str, Any]) -> None:
    """Raise ValueError where a model chunk would compute something else than config.json says."""
    args = megatron_args(config)
    wanted = {_FIELDS.get(name, name): v for name, v in args.items() if name not in _FREE}
    has_dense = 0 in args.get("moe_layer_freq", [0])
    if not has_dense:
        del wanted["ffn_hidden_size"]
    built = chunk.config
    got = {name: getattr(built, name, None) for name in wanted}
    # Without a number of groups, Megatron gives each query head its own.
    got["num_query_groups"] = got["num_query_groups"] or built.num_attention_heads
    got["add_qkv_bias"] = bool(built.add_qkv_bias or built.add_bias_linear)
    for name, nothing in _OTHERWISE.items():
        wanted.setdefault(name, nothing)
        got[name] = getattr(built, name) or nothing
    if wanted["num_moe_experts"]:
        wanted["moe_layers"] = args["moe_layer_freq"]
        got["moe_layers"] = ModelShape.from_mapping(vars(built)).moe_pattern
    for name in ("position_embedding_type", "share_embeddings_and_output_weights"):
        got[name] = getattr(chunk, name)
    wanted["position_embedding_type"] = args["position_embedding_type"]
    wanted["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    if (embedding := getattr(chunk, "rotary_pos_emb", None)) is not None:
        wanted["rotary_percent"] = args["rotary_percent"]
        got["rotary_percent"] = 2 * len(embedding.inv_freq) / wanted["kv_channels"]
    wrong = [
        f"{name} is {got[name]!r}, must be {value!r}"
        for name, value in wanted.items()
        if not _equal(got[name], value)
    ]
    if wrong:
        raise ValueError(
            f"the model does not fit its config.json: {'; '.join(wrong)}: build it with the flags "
            "that `megalora flags --hf-model` prints"
        )


def _equal(got: object, wanted: object) -> bool:
    if isinstance(wanted, float) and isinstance(got, float):
        return math.isclose(got, wanted, rel_tol=1e-9)
    return got == wanted


def _set_rotary_frequencies(chunk: "GPTModel", config: Mapping[str, Any]) -> None:
    embedding = getattr(chunk, "rotary_pos_emb", None)
    if embedding is None:
        return
    wanted, frequencies = rope(config), embedding.inv_freq
    exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (
        2 * len(frequencies)
    )
    fresh = 1.0 / wanted.theta**exponents
    if wanted.factor != 1.0:
        fresh = embedding._apply_scaling(fresh, factor=wanted.factor)
    embedding.inv_freq = fresh.to(frequencies)
    # What `hf_config` writes.
    chunk.rotary_base = wanted.theta
    # The embedding of a length is cached over calls, with the frequencies that it was made of.
    type(embedding).forward.cache_clear()
