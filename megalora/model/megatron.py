"""A model's sizes in Megatron's arguments."""

import json
from collections.abc import Mapping
from typing import Any

from megalora.model.config_json import (
    attention_window,
    layers_with_window,
    mapped_family,
    model_shape,
    with_defaults,
)
from megalora.model.delta_net import delta_args
from megalora.model.experts import router_args
from megalora.model.family import Family
from megalora.model.fields import real_number, whole_number
from megalora.model.hybrid import hybrid_args, pattern_of
from megalora.model.latent import latent_args
from megalora.model.layer_kinds import mamba_args
from megalora.model.rope import Rope, rope, yarn_args
from megalora.model.shape import ModelShape


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments for a configuration, by their names in the parsed namespace."""
    config = with_defaults(config)
    family, shape, rotary = mapped_family(config), model_shape(config), rope(config)
    args: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "max_position_embeddings": whole_number(config, "max_position_embeddings", default=2048),
        "vocab_size": shape.vocab_size,
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        **family.megatron,
        **({} if family.hybrid else _rotary_args(rotary)),
        "layernorm_epsilon": _epsilon(config, family.epsilon_field),
        # Megatron's defaults are 0.1; transformers has none of the hidden state.
        "hidden_dropout": 0.0,
        "attention_dropout": float(real_number(config, "attention_dropout", low=0, high=1) or 0),
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        **delta_args(shape),
    }
    if rotary.yarn and not shape.multi_latent_attention:
        args |= yarn_args(rotary.yarn)
    # With latents Megatron refuses groups, and counts heads' features by sizes of their own.
    args |= latent_args(shape, rotary) if shape.multi_latent_attention else _head_args(shape)
    args |= _more_args(config, family)
    if shape.num_moe_experts:
        args |= _expert_args(shape)
    if family.hybrid:
        pattern = shape.hybrid_layer_pattern
        args = {**hybrid_args(args), **mamba_args(shape), "hybrid_layer_pattern": pattern}
    if family.experts and (shape.num_moe_experts or not family.hybrid):
        args |= router_args(config, family.experts)
    return args


def _rotary_args(rotary: Rope) -> dict[str, Any]:
    is_scaled = rotary.factor != 1.0
    return {
        "rotary_base": int(rotary.theta),
        "rotary_percent": rotary.part,
        "use_rope_scaling": is_scaled,
        **({"rope_scaling_factor": rotary.factor} if is_scaled else {}),
    }


def _more_args(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the arguments for windows, softmax offsets and clamped gates, where there are some."""
    args: dict[str, Any] = {}
    if window := attention_window(config, family):
        # Megatron counts the tokens beside one itself: those before it, those behind it.
        args["window_size"] = (window - 1, 0)
        if 0 in (windows := layers_with_window(config, family)):
            args["window_attn_skip_freq"] = windows
    if family.softmax_offsets:
        args["softmax_type"] = "learnable"
    if family.clamp_field:
        limit = real_number(config, family.clamp_field, low=0, high=1e6)
        if limit is None:
            raise ValueError(f"config.json {family.clamp_field} is null: must be a number")
        args["activation_func_clamp_value"] = limit
    return args


def _head_args(shape: ModelShape) -> dict[str, Any]:
    return {
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
    }


def _expert_args(shape: ModelShape) -> dict[str, Any]:
    sizes = {
        "num_experts": shape.num_moe_experts,
        "moe_router_topk": shape.moe_router_topk,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_layer_freq": shape.moe_pattern,
    }
    if shape.moe_shared_expert_intermediate_size:
        for name in ("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"):
            sizes[name] = getattr(shape, name)
    return sizes


def _epsilon(config: Mapping[str, Any], field: str) -> float:
    given = real_number(config, field, low=0, high=1)
    return 1e-6 if given is None else given


# Names in the namespace whose flag is not the name with dashes.
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
}
_SWITCHES_OFF = {
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
    "bias_dropout_fusion": "--no-bias-dropout-fusion",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
}


def megatron_flags(
    config: Mapping[str, Any], *, hybrid: bool = False, stages: int = 1, predictions: int = 0
) -> list[str]:
    """Return `megatron_args` as command-line flags; flags that follow them override them.

    hybrid: of the HybridModel that equals the model, in so many pipeline stages, and with so many
        layers that predict one token more. A family whose layers are of one kind each is one.
    """
    args, flags = megatron_args(config), list[str]()
    if hybrid or "hybrid_layer_pattern" in args:
        shape = model_shape(config)
        pattern = pattern_of(shape, stages=stages, predictions=predictions)
        args = {**hybrid_args(args), "hybrid_layer_pattern": pattern}
    given = {name: value for name, value in args.items() if value is not None}
    for name, value in given.items():
        if name in _SWITCHES_OFF:
            flags += [] if value else [_SWITCHES_OFF[name]]
        elif isinstance(value, bool):
            flags += [_flag(name)] if value else []
        elif isinstance(value, list):
            flags += [_flag(name), json.dumps(value).replace(" ", "")]
        elif isinstance(value, tuple):
            flags += [_flag(name), ",".join(map(str, value))]
        else:
            flags += [_flag(name), str(value)]
    return flags


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
