"""The one reader of a Hugging Face config.json: of sizes, of the family, of what is not mapped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.model.experts import expert_sizes, router_problem
from megalora.model.families import FAMILIES
from megalora.model.family import Family
from megalora.model.fields import switch, whole_number
from megalora.model.latent import latent_sizes
from megalora.model.loaded import check_readable, with_own_head
from megalora.model.rope import rope_problem
from megalora.model.shape import ModelShape, head_size
from megalora.model.stored import check_stored_sizes, stored_files
from megalora.reading import read_json


def load_config(source: str | Path) -> dict[str, Any]:
    """Read a config.json, or that of a model's directory, of whatever family."""
    path = Path(source)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ValueError(
            f"{path} is an adapter, no base: give the directory of the model that it was trained on"
        )
    return read_json(path if path.is_file() else path / "config.json")


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json of a model whose weights are exchanged, as transformers takes it.

    An unembedding that is stored and differs from the embedding is not tied, whatever is said.
    Raises ValueError where no weights are mapped, where they are quantised in a way that is not
    read, and where the files beside it are of other sizes.
    """
    config = load_config(directory)
    mapped_family(config)
    return checked_config(config, directory)


def checked_config(config: Mapping[str, Any], directory: str | Path) -> dict[str, Any]:
    """Return what `read_config` does, of whatever family; sizes are checked where it is known."""
    files = stored_files(directory)
    check_readable(config, files)
    if files is not None and config.get("model_type") in tuple(FAMILIES):
        check_stored_sizes(model_shape(config), files)
    return with_own_head(config, files)


def hidden_size_of(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size of a configuration of whatever family, None where it has none."""
    return None if config.get("hidden_size") is None else whole_number(config, "hidden_size")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the row of a configuration; ValueError for a family that is not in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json model_type is {model_type!r:.100}: supported are "
            f"{', '.join(sorted(FAMILIES))}; or, for recommendations, the sizes as "
            "Megatron's flags (not linear attention or multimodal models)"
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
    for name, supported in {"hidden_act": "silu", **family.refused}.items():
        if config.get(name, supported) not in (supported, None):
            return (
                f"config.json {name} is {config[name]!r:.100}, {family.model_type} is supported "
                f"with {supported!r} only"
            )
    if family.experts and (problem := router_problem(with_defaults(config), family.experts)):
        return problem
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        return f"config.json layer_types is {kinds!r:.100}: full_attention alone is supported"
    return ""


def attention_window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the tokens that one attends to, itself and those before it; None for all of these."""
    if not family.window_field or config.get(family.window_field) is None:
        return None
    return whole_number(config, family.window_field, size="max_position_embeddings")


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the numbers that transformers takes for fields it has not."""
    return {**family_of(config).defaults, **config}


def model_shape(config: Mapping[str, Any], *, name: str = "") -> ModelShape:
    """Return the sizes of a configuration of any family in the table.

    name: for people; that of config.json by default.
    Raises ValueError, by field and value, for what is missing or impossible.
    """
    family = family_of(config)
    try:
        attention_window(config, family)
        stored_predictions(config)
        return _shape(with_defaults(config), family, name)
    except ValueError as error:
        sentence = str(error).removeprefix("config.json ")
        raise ValueError(f"config.json {sentence}") from None


def _shape(config: Mapping[str, Any], family: Family, name: str) -> ModelShape:
    heads, hidden = whole_number(config, "num_attention_heads"), whole_number(config, "hidden_size")
    attention = latent_sizes if family.latent else _attention_sizes
    return ModelShape(
        num_layers=whole_number(config, "num_hidden_layers", size="num_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=whole_number(config, "vocab_size"),
        ffn_hidden_size=whole_number(config, "intermediate_size", size="ffn_hidden_size"),
        qk_layernorm=switch(config, family.qk_norm_field, default=family.qk_norm),
        add_qkv_bias=switch(config, family.qkv_bias_field, default=family.qkv_bias),
        tied_embeddings=switch(config, "tie_word_embeddings", default=family.tied),
        family=family.rate.name,
        name=name or str(config.get("_name_or_path") or family.model_type),
        model_type=family.model_type,
        unmapped=mapping_problem(config, family) or rope_problem(config),
        **attention(config, heads, hidden),
        **(expert_sizes(config, family.experts) if family.experts else {}),
    )


def _attention_sizes(config: Mapping[str, Any], heads: int, hidden_size: int) -> dict[str, int]:
    groups = whole_number(config, "num_key_value_heads", size="num_query_groups", default=heads)
    has_head_dim = config.get("head_dim") is not None
    return {
        "num_query_groups": groups,
        "kv_channels": whole_number(config, "head_dim", size="kv_channels")
        if has_head_dim
        else head_size(hidden_size, heads),
    }


def stored_predictions(config: Mapping[str, Any]) -> int:
    """Return how many layers behind the decoder's predict one token more, as its files have them.

    Raises ValueError where the number is none.
    """
    field = family_of(config).prediction_field
    return (
        whole_number(with_defaults(config), field, size="num_layers", low=0, default=0)
        if field
        else 0
    )
