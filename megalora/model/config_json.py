"""The one reader of a Hugging Face config.json: of sizes, of the family, of what is not mapped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.model.families import FAMILIES, mapped_families
from megalora.model.family import Experts, Family
from megalora.model.rope import rope_problem
from megalora.model.shape import ModelShape, head_size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file raises ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} the right directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def load_config(source: str | Path) -> dict[str, Any]:
    """Read a config.json, or that of a model's directory, of whatever family."""
    path = Path(source)
    return read_json(path if path.is_file() else path / "config.json")


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json of a model whose weights are exchanged; ValueError where none are mapped."""
    config = load_config(directory)
    mapped_family(config)
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the row of a configuration; ValueError for a family that is not in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        mapped = mapped_families()
        sizes_alone = ", ".join(name for name in FAMILIES if name not in mapped)
        raise ValueError(
            f"config.json model_type is {model_type!r}: supported are {', '.join(mapped)}; for "
            f"recommendations also {sizes_alone}; or the sizes as Megatron's flags (not MLA, "
            "linear attention or multimodal models)"
        )
    return FAMILIES[model_type]


def mapped_family(config: Mapping[str, Any]) -> Family:
    """Return the row of a configuration; ValueError where its weights cannot be exchanged."""
    family = family_of(config)
    if problem := mapping_problem(config, family):
        raise ValueError(problem)
    return family


def mapping_problem(config: Mapping[str, Any], family: Family) -> str:
    """Say why a configuration's weights cannot be exchanged; empty where they can."""
    if family.names is None:
        return (
            f"config.json model_type is {family.model_type!r}, of which recommendations know the "
            f"sizes and nothing else: supported are {', '.join(mapped_families())}"
        )
    for name, supported in {"hidden_act": "silu", **family.refused}.items():
        if config.get(name, supported) not in (supported, None):
            return (
                f"config.json {name} is {config[name]!r}, {family.model_type} is supported with "
                f"{supported!r} only"
            )
    return ""


def model_shape(config: Mapping[str, Any], *, name: str = "") -> ModelShape:
    """Return the sizes of a configuration of any family in the table.

    name: for people; that of config.json by default.
    Raises ValueError, by field and value, for what is missing or impossible.
    """
    family = family_of(config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    head_dim = None if config.get("head_dim") is None else _size(config, "head_dim")
    return ModelShape(
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=_size(config, "num_key_value_heads", default=heads),
        kv_channels=head_dim or head_size(hidden, heads),
        vocab_size=_size(config, "vocab_size"),
        ffn_hidden_size=_size(config, "intermediate_size"),
        qk_layernorm=family.qk_norm,
        add_qkv_bias=bool(config.get(family.qkv_bias_field, family.qkv_bias)),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
        family=family.rate.name,
        name=name or str(config.get("_name_or_path") or family.model_type),
        model_type=family.model_type,
        unmapped=mapping_problem(config, family) or rope_problem(config),
        **(_experts(config, family.experts) if family.experts else {}),
    )


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """Return the first of these fields that is not null."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json {names[0]} is {value!r}: must be an integer >= 1")
    return value


def _experts(config: Mapping[str, Any], experts: Experts) -> dict[str, Any]:
    sizes = {
        "num_moe_experts": _size(config, *experts.count),
        "moe_router_topk": _size(config, "num_experts_per_tok"),
        "moe_ffn_hidden_size": _size(config, experts.size),
        "moe_layer_freq": _moe_layer_freq(config),
    }
    if experts.shared_size:
        shared = _size(config, experts.shared_size)
        sizes |= {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": True}
    return sizes


def _moe_layer_freq(config: Mapping[str, Any]) -> int | list[int]:
    step = _size(config, "decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json mlp_only_layers is {dense!r}: must be a list of layers")
    layers = range(_size(config, "num_hidden_layers"))
    frequency = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
    return 1 if all(frequency) else frequency
