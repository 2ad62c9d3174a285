"""The sizes of a model from Megatron's arguments."""

import argparse
from typing import Any

from megalora.model.delta_net import sizes_in_args
from megalora.model.hybrid import as_gpt, layers_of, refuse_other
from megalora.model.layer_kinds import KINDS, SIZES
from megalora.model.presets import as_preset
from megalora.model.shape import MAX_SIZES, ModelShape, head_size

_UNDESCRIBED = {
    "mtp_use_repeated_layer": (),
    "experimental_attention_variant": ("gated_delta_net",),
}


def args_shape(args: argparse.Namespace, *, family: str = "") -> ModelShape:
    """Return the sizes that Megatron's parsed arguments give, or the same flags of a command.

    family: the learning rate rule's; where it is empty and the sizes are a preset's, the preset's.
    Raises ValueError where a size is missing, for sparse attention, and for hybrid models of other
    layers than GPT models and Nemotron-H have.
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
        **{name: given(name, False) for name in _SWITCHES},
        softmax_type=given("softmax_type", "vanilla"),
        mtp_num_layers=given("mtp_num_layers", 0),
        family=family,
        name="Megatron flags",
        **(_expert_sizes(args, ffn) if given("num_experts", 0) else {}),
        **_hybrid_sizes(args),
    )
    return shape if family else as_preset(shape)


_SWITCHES = ("qk_layernorm", "add_qkv_bias", "add_bias_linear", "attention_output_gate")
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
        sizes = {"num_query_groups": groups if grouped else heads, "kv_channels": size}
        return sizes | sizes_in_args(args)
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
    if not pattern or set(layers_of(pattern)) - set(KINDS):
        refuse_other(pattern)
    return argparse.Namespace(**as_gpt(vars(args), pattern))


# Megatron's own defaults; the number of heads follows from the hidden size.
_MAMBA_SIZES = {"mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_state_dim": 128}


def _hybrid_sizes(args: argparse.Namespace) -> dict[str, Any]:
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:
        return {}
    given = {name: getattr(args, name, None) or _MAMBA_SIZES.get(name, 0) for name in SIZES}
    latent = getattr(args, "moe_latent_size", None) or 0
    return {**given, "hybrid_layer_pattern": pattern, "moe_latent_size": latent}


def _check_described(args: argparse.Namespace) -> None:
    for flag, described in _UNDESCRIBED.items():
        if (value := getattr(args, flag, None)) and value not in described:
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
