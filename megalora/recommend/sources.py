"""Read the sizes of a model from a Hugging Face config.json or from Megatron's arguments."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Hugging Face model_type -> family of the learning rate rule.
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen2_moe": "qwen",
    "qwen3_moe": "qwen",
}
_UNDESCRIBED = (
    "multi_latent_attention",
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "experimental_attention_variant",
)


def read_hf_config(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the content of a config.json (or its folder, or itself) and a name for it."""
    if isinstance(source, Mapping):
        return source, str(source.get("_name_or_path") or source.get("model_type") or "model")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"model {source} has no config.json: give a Hugging Face model's folder")
    try:
        return json.loads(path.read_text()), path.parent.name
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error


def hf_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelShape, but its name, that a config.json gives.

    Raises ValueError for an architecture whose linears ModelShape does not describe.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not described here (MLA, linear attention and "
            f"multimodal models are not supported): use one of {', '.join(FAMILIES)}, or give "
            "the sizes as Megatron flags"
        )
    try:
        return {"family": FAMILIES[model_type], **_hf_dense(config, model_type)}
    except KeyError as missing:
        raise ValueError(
            f"config.json has no {missing}: it is not a whole {model_type} configuration"
        ) from missing


def _hf_dense(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "qkv_bias": config.get("qkv_bias", model_type in ("qwen2", "qwen2_moe")),
        **_hf_experts(config, model_type),
    }


def _hf_experts(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    if model_type not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return {}
    # Both spellings are written, by different versions of transformers.
    experts = config.get("num_experts") or config["num_local_experts"]
    shared = config["shared_expert_intermediate_size"] if model_type == "qwen2_moe" else 0
    step, only_dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return {
        "num_experts": experts,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config["intermediate_size"],
        "shared_expert_size": shared,
        "shared_expert_gate": bool(shared),
        "dense_layers": tuple(
            layer
            for layer in range(config["num_hidden_layers"])
            if layer in only_dense or (layer + 1) % step
        ),
    }


def megatron_sizes(args: Any) -> dict[str, Any]:
    """Return the fields of ModelShape, but name and family, that Megatron's arguments give.

    Raises ValueError where a size is missing, and for models that ModelShape does not describe.
    """

    def given(name: str, default: Any = None) -> Any:
        value = getattr(args, name, None)
        return default if value is None else value

    for flag in _UNDESCRIBED:
        if given(flag):
            raise ValueError(
                f"{flag} is {given(flag)!r}, whose linears are not described here: "
                "count the adapters of the built model with `megalora inspect`"
            )
    for flag in ("num_layers", "hidden_size", "num_attention_heads"):
        if not given(flag):
            raise ValueError(f"{flag} is missing: give --{flag.replace('_', '-')}")
    vocab_size = given("padded_vocab_size", given("vocab_size"))
    if not vocab_size:
        raise ValueError("vocab_size is missing: give --vocab-size")
    hidden, heads = args.hidden_size, args.num_attention_heads
    gated = bool(given("swiglu", False) or given("quick_geglu", False))
    # Megatron's own default, arguments.py: about 4 hidden, a third less where gated.
    ffn = given("ffn_hidden_size", int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    return {
        "num_layers": args.num_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": given("num_query_groups", 1)
        if given("group_query_attention", False)
        else heads,
        "kv_channels": given("kv_channels", hidden // heads),
        "ffn_hidden_size": ffn,
        "vocab_size": vocab_size,
        "gated": gated,
        "tied": not given("untie_embeddings_and_output_weights", False),
        "qk_norm": bool(given("qk_layernorm", False)),
        "qkv_bias": bool(given("add_qkv_bias", False)),
        "attention_output_gate": bool(given("attention_output_gate", False)),
        **(
            _megatron_experts(args, given("moe_layer_freq", 1), ffn) if given("num_experts") else {}
        ),
    }


def _megatron_experts(args: Any, freq: int | list[int], ffn: int) -> dict[str, Any]:
    layers = range(args.num_layers)
    pattern = freq if isinstance(freq, list) else [int(layer % freq == 0) for layer in layers]
    if len(pattern) != len(layers):
        raise ValueError(
            f"moe_layer_freq has {len(pattern)} entries for {len(layers)} layers: give one for each"
        )
    return {
        "num_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_ffn_hidden_size": getattr(args, "moe_ffn_hidden_size", None) or ffn,
        "shared_expert_size": getattr(args, "moe_shared_expert_intermediate_size", None) or 0,
        "shared_expert_gate": bool(getattr(args, "moe_shared_expert_gate", False)),
        "dense_layers": tuple(layer for layer in layers if not pattern[layer]),
    }
