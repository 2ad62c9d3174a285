"""Model families: what a config.json means in Megatron's words, one table each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.hf.files import read_json
from megalora.hf.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one `model_type` have beside attention, a gated MLP and RMSNorm.

    qkv_bias: name of the configuration's switch for a bias of q, k and v; True where it always is.
    qk_norm: q and k are normalised per head.
    has_experts: MLPs are mixtures of experts.
    tied: whether embeddings are tied where config.json does not say.
    vllm_unembedding: vLLM takes an adapter of lm_head.
    refused: switches that would change the computation, with the value that is supported.
    """

    architecture: str
    qkv_bias: str | bool = False
    qk_norm: bool = False
    has_experts: bool = False
    tied: bool = False
    vllm_unembedding: bool = True
    refused: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        refused={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        vllm_unembedding=False,
        refused={"use_sliding_window": False},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        qk_norm=True,
        has_experts=True,
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
}

# Megatron hard-codes these parameters of Llama 3's rope scaling.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json of a model directory and check that its family is supported."""
    config = read_json(Path(directory) / "config.json")
    family_of(config)
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a configuration; ValueError for what would compute something else."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json model_type is {model_type!r}: supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    for name, supported in {**family.refused, "hidden_act": "silu"}.items():
        if config.get(name, supported) not in (supported, None):
            raise ValueError(
                f"config.json {name} is {config[name]!r}, {model_type} is supported with "
                f"{supported!r} only"
            )
    return family


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of a configuration; ValueError names a required field that is missing."""
    family = family_of(config)

    def need(*names: str) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json {names[0]} is {value!r}: must be an integer >= 1")
        return value

    heads, hidden = need("num_attention_heads"), need("hidden_size")
    experts: dict[str, Any] = {}
    if family.has_experts:
        experts = {
            # transformers 5 writes the second name.
            "num_moe_experts": need("num_experts", "num_local_experts"),
            "moe_router_topk": need("num_experts_per_tok"),
            "moe_ffn_hidden_size": need("moe_intermediate_size"),
            "moe_layer_freq": _moe_layer_freq(config, need("num_hidden_layers")),
        }
    return ModelShape(
        num_layers=need("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=need("num_key_value_heads") if "num_key_value_heads" in config else heads,
        kv_channels=need("head_dim") if config.get("head_dim") else hidden // heads,
        vocab_size=need("vocab_size"),
        ffn_hidden_size=need("intermediate_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
        **experts,
    )


def _moe_layer_freq(config: Mapping[str, Any], num_layers: int) -> int | list[int]:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(num_layers)]
    return 1 if all(layers) else layers


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: its base, and the factor of Llama 3's scaling (1 where there is none)."""

    theta: float
    factor: float


def rope(config: Mapping[str, Any]) -> Rope:
    """Return the rotary embedding of a configuration, old and new spelling.

    Raises ValueError for scalings other than Llama 3's, and for other parameters of it.
    """
    # transformers 5 has rope_parameters, earlier ones rope_theta and rope_scaling.
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return Rope(theta, 1.0)
    if kind != "llama3":
        raise ValueError(
            f"config.json rope_type is {kind!r}: supported are 'default' and 'llama3'; remove the "
            "scaling where sequences are no longer than the model was trained with"
        )
    for name, supported in _LLAMA3_ROPE.items():
        if float(values.get(name, supported)) != supported:
            raise ValueError(
                f"config.json {name} of the llama3 rope is {values[name]!r}: Megatron has it fixed "
                f"at {supported}"
            )
    return Rope(theta, float(values.get("factor", 8.0)))


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments for a configuration, by their names in the parsed namespace."""
    family, shape, rotary = family_of(config), model_shape(config), rope(config)
    args: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "max_position_embeddings": config.get("max_position_embeddings") or 2048,
        "vocab_size": shape.vocab_size,
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(rotary.theta),
        "use_rope_scaling": rotary.factor != 1.0,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": bool(family.qkv_bias),
        "qk_layernorm": family.qk_norm,
    }
    if rotary.factor != 1.0:
        args["rope_scaling_factor"] = rotary.factor
    if family.has_experts:
        args |= _expert_args(config, shape)
    return args


def _expert_args(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    return {
        "num_experts": shape.num_moe_experts,
        "moe_router_topk": shape.moe_router_topk,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_layer_freq": [int(layer in shape.moe_layers) for layer in range(shape.num_layers)],
        # Normalising the top k of a softmax over all is the softmax over the top k.
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }


# Names in the namespace whose flag is not the name with dashes.
_FLAGS = {"layernorm_epsilon": "--norm-epsilon"}
_SWITCHES_OFF = {"add_bias_linear": "--disable-bias-linear"}


def megatron_flags(config: Mapping[str, Any]) -> list[str]:
    """Return `megatron_args` as command-line flags; flags that follow them override them."""
    flags: list[str] = []
    for name, value in megatron_args(config).items():
        if name in _SWITCHES_OFF:
            flags += [] if value else [_SWITCHES_OFF[name]]
        elif isinstance(value, bool):
            flags += [_flag(name)] if value else []
        elif isinstance(value, list):
            flags += [_flag(name), json.dumps(value).replace(" ", "")]
        else:
            flags += [_flag(name), str(value)]
    return flags


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
