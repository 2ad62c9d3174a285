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
from megalora.hf.latent_norms import set_latent_norms
from megalora.hf.rotary import set_rotary
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Piece, Placement, Shard, Weights
from megalora.model.config_json import read_config, stored_predictions
from megalora.model.families import names_of
from megalora.model.hybrid import config_of, gpt_name, pattern_in, refuse_other
from megalora.model.megatron import megatron_args
from megalora.model.shape import ModelShape
from megalora.targets import global_name, is_adapter_key

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

_LAYERS = re.compile(r"(decoder|mtp)\.layers\.\d+")
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")

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
# A parameter with its name and its pieces.
Job = tuple[str, Tensor, list[Piece]]
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
    "multi_latent_attention": False,
    "mtp_use_repeated_layer": False,
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
    Rotary embeddings are set from config.json, since Megatron's builder drops scaling factors, and
    so are the norms of latents. A layer that predicts one token more is loaded where it was built.
    progress: called with every parameter's name.
    Raises ValueError, before anything is changed, where the directory is broken or incomplete, or
    where the model was built with other sizes or options than its config.json has; and on all
    ranks, once all is read, where a rank's weights are not finite. All ranks must call it.
    """
    config = read_config(directory)
    files = HFWeights(directory, names_of(config["model_type"]))
    chunks = cast("Sequence[GPTModel]", model_chunks)
    jobs = _plan(chunks, config, files)
    problems: list[str] = []
    for name, param, pieces in jobs:
        _fill(param, pieces, files)
        problems += _not_finite(param, pieces, files)
        if progress:
            progress(name)
    on_all_ranks(functools.partial(_refuse, problems))
    for chunk in chunks:
        set_rotary(chunk, config)
        set_latent_norms(chunk)


def _plan(chunks: "Sequence[GPTModel]", config: Mapping[str, Any], files: HFWeights) -> list[Job]:
    """Return this rank's parameters with what they are read from; nothing is changed."""
    jobs: list[Job] = []
    copies: dict[str, str] = {}
    for chunk in chunks:
        check_built_for(chunk, config)
        weights = weights_of(chunk, config)
        tied = weights.shape.tied_embeddings
        files.check(weights.expected(), tied=tied, may_have=weights.may_be_stored)
        for name, param, _, pieces in parameters(chunk, weights):
            _check_covered(name, param, pieces)
            jobs.append((name, param, pieces))
        copies |= weights.copies()
    on_all_ranks(functools.partial(_refuse_others, _other_copies(copies, jobs, files)))
    return jobs


def _fill(param: Tensor, pieces: list[Piece], files: HFWeights) -> None:
    filled = sum(piece.count for piece in pieces)
    param[filled:].zero_()
    for piece in pieces:
        part = files.read(piece.name, piece.hf_first, piece.count, piece.columns)
        param[piece.first : piece.first + piece.count].copy_(part)


def _not_finite(param: Tensor, pieces: list[Piece], files: HFWeights) -> list[str]:
    """Return the pieces that a parameter has NaN or infinities from, after file and precision.

    The parameter is looked at, not the file: it may be on a GPU, and of another precision.
    """
    if all_finite(param):
        return []
    bad = [p for p in pieces if not all_finite(param[p.first : p.first + p.count])]
    return [f"{files.path(piece.name)}: {piece.name} as {param.dtype}" for piece in bad]


def _other_copies(copies: dict[str, str], jobs: list[Job], files: HFWeights) -> list[str]:
    """Return the tables of layers that predict one token more that are not the model's own."""
    return [
        f"{copy} differs from {original}"
        for copy, original in copies.items()
        if copy in files.shapes
        and not all(
            files.shapes[copy] == files.shapes[original]
            and files.read(copy, p.hf_first, p.count).equal(
                files.read(original, p.hf_first, p.count)
            )
            for _, _, pieces in jobs
            for p in pieces
            if p.name == original
        )
    ]


def _refuse_others(others: list[str]) -> None:
    if others:
        raise ValueError(
            f"base has tables of its own where one token more is predicted: {summarise(others)}: "
            "Megatron has one for all: leave --mtp-num-layers out"
        )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"base has NaN or infinite values in {summarise(problems)}: download it again; or its "
            "values are beyond this precision, and need --bf16"
        )


def weights_of(chunk: "GPTModel", config: Mapping[str, Any]) -> Weights:
    """Return the pieces of this rank's parameters of a model."""
    return Weights(config, placement(chunk), num_predictions=chunk.config.mtp_num_layers or 0)


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
    """Yield every base parameter of a chunk with its global layer from 0 and its pieces.

    Names are global, and those of the GPT model that a HybridModel equals.
    """
    # What predicts one token more is counted on behind the decoder's.
    behind = {"decoder": 0, "mtp": config_of(chunk).num_layers}
    numbers = {
        name: cast(int, module.layer_number)
        for name, module in chunk.named_modules()
        if _LAYERS.fullmatch(name)
    }
    for local, param in [*chunk.named_parameters(), *_expert_biases(chunk)]:
        if is_adapter_key(local):
            continue
        name = gpt_name(global_name(local, numbers), pattern_in(chunk))
        found = _LAYER.match(name)
        layer = int(found[2]) + behind[found[1]] if found else None
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
    refuse_other(pattern_in(chunk))
    args = megatron_args(config)
    # Attention through latents has its embedding of the configuration, all others of the model.
    free = _FREE - {"rotary_base"} if "multi_latent_attention" in args else _FREE
    wanted = {_FIELDS.get(name, name): v for name, v in args.items() if name not in free}
    if 0 not in args.get("moe_layer_freq", [0]):
        del wanted["ffn_hidden_size"]
    built = config_of(chunk)
    got = {name: getattr(built, name, None) for name in wanted}
    # Without a number of groups, Megatron gives each query head its own.
    got["num_query_groups"] = built.num_query_groups or built.num_attention_heads
    got["add_qkv_bias"] = bool(built.add_qkv_bias or built.add_bias_linear)
    for name, nothing in _OTHERWISE.items():
        wanted.setdefault(name, nothing)
        got[name] = getattr(built, name) or nothing
    if wanted["num_moe_experts"]:
        wanted["moe_layers"] = args["moe_layer_freq"]
        got["moe_layers"] = ModelShape.from_mapping(vars(built)).moe_pattern
    # As many as a user asks for, as far as there are weights.
    got["mtp_num_layers"] = built.mtp_num_layers or 0
    wanted["mtp_num_layers"] = min(got["mtp_num_layers"], stored_predictions(config))
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
