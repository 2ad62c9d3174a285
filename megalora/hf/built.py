"""Whether a Megatron model computes what a Hugging Face config.json says."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalora.model.config_json import stored_predictions
from megalora.model.hybrid import config_of, pattern_in, refuse_other, windows_of
from megalora.model.layer_kinds import MLP
from megalora.model.megatron import megatron_args
from megalora.model.rope import yarn_options
from megalora.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

# Megatron's argument -> field of TransformerConfig, where the names differ.
_FIELDS = {"num_experts": "num_moe_experts"}
# Megatron's argument -> the function that it stands for, and whether that is of a gate.
_ACTIVATIONS = {
    "swiglu": ("silu", True),
    "quick_geglu": ("quick_gelu", True),
    "squared_relu": ("squared_relu", False),
}
# Of YaRN, arguments that are fields of attention through latents alone.
_OF_YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
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
    "bias_dropout_fusion",
    "window_attn_skip_freq",
    *_ACTIVATIONS,
}
# What a model has where its arguments say nothing, of options that change the computation.
_OTHERWISE = {
    "num_moe_experts": 0,
    "window_size": None,
    "softmax_type": "vanilla",
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": 0,
    "moe_shared_expert_gate": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "mtp_use_repeated_layer": False,
    "hybrid_layer_pattern": None,
    "moe_latent_size": None,
}


def check_built_for(chunk: "GPTModel", config: Mapping[str, Any]) -> None:
    """Raise ValueError where a model chunk would compute something else than config.json says."""
    refuse_other(pattern_in(chunk), str(config.get("model_type")))
    args, built = megatron_args(config), config_of(chunk)
    wanted, got = _options(built, args)
    layers = ModelShape.from_mapping(vars(built))
    if wanted["num_moe_experts"] and "moe_layer_freq" in args:
        wanted["moe_layers"], got["moe_layers"] = args["moe_layer_freq"], layers.moe_pattern
    if "linear_attention_freq" in wanted:
        got["linear_attention_freq"] = layers.delta_net_pattern
    if got["window_size"] and wanted["window_size"]:
        asked = args.get("window_attn_skip_freq")
        for found, frequency in ((got, built.window_attn_skip_freq), (wanted, asked)):
            found["window_layers"] = windows_of(frequency, built.num_layers)
    # As many as a user asks for, as far as there are weights.
    got["mtp_num_layers"] = built.mtp_num_layers or 0
    wanted["mtp_num_layers"] = min(got["mtp_num_layers"], stored_predictions(config))
    for name in ("position_embedding_type", "share_embeddings_and_output_weights"):
        got[name] = getattr(chunk, name)
    wanted["position_embedding_type"] = args["position_embedding_type"]
    wanted["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    embedding = getattr(chunk, "rotary_pos_emb", None)
    if embedding is not None and "rotary_percent" in args:
        wanted["rotary_percent"] = args["rotary_percent"]
        got["rotary_percent"] = 2 * len(embedding.inv_freq) / wanted["kv_channels"]
    _refuse_other(wanted, got)


def _refuse_other(wanted: Mapping[str, object], got: Mapping[str, object]) -> None:
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


def _options(
    built: "TransformerConfig", args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of TransformerConfig that arguments ask for, and those of a model."""
    # Attention through latents has its embedding of the configuration, all others of the model.
    free = _FREE - {"rotary_base"} if "multi_latent_attention" in args else _FREE
    wanted = {_FIELDS.get(name, name): v for name, v in args.items() if name not in free}
    if scaled := yarn_options(args):
        wanted = {name: v for name, v in wanted.items() if name not in _OF_YARN} | scaled
    if 0 not in args.get("moe_layer_freq", [0]) or MLP not in args.get("hybrid_layer_pattern", MLP):
        del wanted["ffn_hidden_size"]
    got = {name: getattr(built, name, None) for name in wanted}
    # Without a number of groups, Megatron gives each query head its own.
    got["num_query_groups"] = built.num_query_groups or built.num_attention_heads
    got["add_qkv_bias"] = bool(built.add_qkv_bias or built.add_bias_linear)
    for name, nothing in _OTHERWISE.items():
        wanted.setdefault(name, nothing)
        got[name] = getattr(built, name, nothing) or nothing
    for name, (activation, is_gate) in _ACTIVATIONS.items():
        if args.get(name):
            wanted |= {"gated_linear_unit": is_gate, "activation_func": activation}
            got["gated_linear_unit"] = built.gated_linear_unit
            got["activation_func"] = getattr(built.activation_func, "__name__", "")
    return wanted, got


def _equal(got: object, wanted: object) -> bool:
    if isinstance(wanted, float) and isinstance(got, float):
        return math.isclose(got, wanted, rel_tol=1e-9)
    return got == wanted
