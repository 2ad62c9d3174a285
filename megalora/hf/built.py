"""Whether a Megatron model computes what a Hugging Face config.json says."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalora.model.config_json import stored_predictions
from megalora.model.hybrid import config_of, pattern_in, refuse_other
from megalora.model.megatron import megatron_args
from megalora.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

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
    "multi_latent_attention": False,
    "mtp_use_repeated_layer": False,
}


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
