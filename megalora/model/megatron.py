"""A model's sizes in Megatron's arguments, both ways."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from megalora.model.config_json import (
    attention_window,
    mapped_family,
    model_shape,
    with_defaults,
)
from megalora.model.experts import router_args
from megalora.model.fields import real_number, whole_number
from megalora.model.hybrid import as_gpt, pattern_of, refuse_other
from megalora.model.latent import latent_args
from megalora.model.presets import as_preset
from megalora.model.rope import rope
from megalora.model.shape import MAX_SIZES, ModelShape, head_size

_UNDESCRIBED = (
    "mtp_use_repeated_layer",
    "experimental_attention_variant",
)


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
        "rotary_base": int(rotary.theta),
        "rotary_percent": rotary.part,
        "use_rope_scaling": rotary.factor != 1.0,
        "layernorm_epsilon": _epsilon(config),
        # Megatron's defaults are 0.1; transformers has none of the hidden state.
        "hidden_dropout": 0.0,
        "attention_dropout": float(real_number(config, "attention_dropout", low=0, high=1) or 0),
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
    }
    if rotary.factor != 1.0:
        args["rope_scaling_factor"] = rotary.factor
    # With latents Megatron refuses groups, and counts heads' features by sizes of their own.
    args |= latent_args(shape, rotary) if shape.multi_latent_attention else _head_args(shape)
    if window := attention_window(config, family):
        # Megatron counts the tokens beside one itself: those before it, those behind it.
        args["window_size"] = (window - 1, 0)
    if shape.num_moe_experts:
        args |= _expert_args(shape)
    if family.experts:
        args |= router_args(config, family.experts)
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


def _epsilon(config: Mapping[str, Any]) -> float:
    given = real_number(config, "rms_norm_eps", low=0, high=1)
    return 1e-6 if given is None else given


# Names in the namespace whose flag is not the name with dashes.
_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}
# What a HybridModel's pattern says.
_OF_PATTERN = ("num_layers", "moe_layer_freq")
_SWITCHES_OFF = {
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
}


def megatron_flags(
    config: Mapping[str, Any], *, hybrid: bool = False, stages: int = 1, predictions: int = 0
) -> list[str]:
    """Return `megatron_args` as command-line flags; flags that follow them override them.

    hybrid: of the HybridModel that equals the model, in so many pipeline stages, and with so many
        layers that predict one token more.
    """
    args, flags = megatron_args(config), list[str]()
    if hybrid:
        args = {name: value for name, value in args.items() if name not in _OF_PATTERN}
        shape = model_shape(config)
        pattern = pattern_of(shape, stages=stages, predictions=predictions)
        args["hybrid_layer_pattern"] = pattern
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


def args_shape(args: argparse.Namespace, *, family: str = "") -> ModelShape:
    """Return the sizes that Megatron's parsed arguments give, or the same flags of a command.

    family: the learning rate rule's; where it is empty and the sizes are a preset's, the preset's.
    Raises ValueError where a size is missing, for linear and sparse attention, and for hybrid
    models that equal no GPT model.
    """
    args = _gpt_args(args)

    def given[T](name: str, default: T) -> T:
        value = getattr(args, name, None)
        return default if value is None else value

    _check_described(args)
    vocab_size = given("padded_vocab_size", given("vocab_size", 0))
    if not vocab_size:
        raise ValueError("vocab_size is missing: give --vocab-size")
    hidden, heads = args.hidden_size, args.num_attention_heads
    gated = given("swiglu", False) or given("quick_geglu", False)
    # Megatron's own default, arguments.py: about 4 hidden, a third less where gated.
    ffn = given("ffn_hidden_size", int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    shape = ModelShape(
        num_layers=args.num_layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        **_attention_sizes(args),
        ffn_hidden_size=ffn,
        vocab_size=vocab_size,
        gated_linear_unit=gated,
        tied_embeddings=not given("untie_embeddings_and_output_weights", False),
        qk_layernorm=given("qk_layernorm", False),
        add_qkv_bias=given("add_qkv_bias", False),
        mtp_num_layers=given("mtp_num_layers", 0),
        attention_output_gate=given("attention_output_gate", False),
        family=family,
        name="Megatron flags",
        **(_expert_sizes(args, ffn) if given("num_experts", 0) else {}),
    )
    return shape if family else as_preset(shape)


# Megatron's own defaults, arguments.py.
_LATENT_SIZES = {
    "q_lora_rank": 0,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}


def _attention_sizes(args: argparse.Namespace) -> dict[str, Any]:
    heads = args.num_attention_heads
    if not getattr(args, "multi_latent_attention", False):
        grouped = getattr(args, "group_query_attention", False)
        groups = getattr(args, "num_query_groups", None) or 1
        size = getattr(args, "kv_channels", None) or head_size(args.hidden_size, heads)
        return {"num_query_groups": groups if grouped else heads, "kv_channels": size}
    given = {name: getattr(args, name, None) for name in _LATENT_SIZES}
    return {
        "num_query_groups": heads,
        # It decides nothing.
        "kv_channels": max(1, args.hidden_size // heads),
        "multi_latent_attention": True,
        **{name: given[name] or default for name, default in _LATENT_SIZES.items()},
    }


def _gpt_args(args: argparse.Namespace) -> argparse.Namespace:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    refuse_other(pattern)
    return argparse.Namespace(**as_gpt(vars(args), pattern))


def _check_described(args: argparse.Namespace) -> None:
    for flag in _UNDESCRIBED:
        if value := getattr(args, flag, None):
            raise ValueError(
                f"{flag} is {value!r}, whose linears are not described here: "
                "count the adapters of the built model with `megalora inspect`"
            )
    for flag in ("num_layers", "hidden_size", "num_attention_heads"):
        if not getattr(args, flag, None):
            raise ValueError(f"{flag} is missing: give --{flag.replace('_', '-')}")
    if args.num_layers > MAX_SIZES["num_layers"]:
        limit = MAX_SIZES["num_layers"]
        raise ValueError(f"num_layers is {args.num_layers}: must be {limit:,} at most")


def _expert_sizes(args: argparse.Namespace, ffn: int) -> dict[str, Any]:
    frequency, layers = getattr(args, "moe_layer_freq", None) or 1, range(args.num_layers)
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in layers]
    if len(frequency) != len(layers):
        raise ValueError(
            f"moe_layer_freq has {len(frequency)} entries for {len(layers)} layers: give one for "
            "each"
        )
    shared = getattr(args, "moe_shared_expert_intermediate_size", None)
    return {
        "num_moe_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_ffn_hidden_size": getattr(args, "moe_ffn_hidden_size", None) or ffn,
        "moe_layer_freq": 1 if all(frequency) else frequency,
        "moe_shared_expert_intermediate_size": shared or 0,
        "moe_shared_expert_gate": getattr(args, "moe_shared_expert_gate", False),
    }
