"""The one reader of a Hugging Face config.json: of sizes, of the family, of what is not mapped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.model.delta_net import delta_sizes
from megalora.model.experts import expert_sizes, router_problem
from megalora.model.families import FAMILIES
from megalora.model.family import Family
from megalora.model.fields import switch, whole_number
from megalora.model.latent import latent_sizes
from megalora.model.layer_kinds import EXPERTS, hybrid_sizes, layer_kinds
from megalora.model.loaded import check_readable, with_own_head
from megalora.model.multimodal import language_config
from megalora.model.mxfp4 import as_plain
from megalora.model.not_yet import why_not_yet
from megalora.model.rope import rope_problem
from megalora.model.shape import ModelShape, head_size
from megalora.model.stored import check_stored_sizes, stored_files
from megalora.reading import read_json


def load_config(source: str | Path) -> dict[str, Any]:
    """Read a config.json, or that of a model's directory, of whatever family."""
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"{path} is no directory here: give one that has a model's config.json and "
            f"safetensors{_from_hub(path)}"
        )
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ValueError(
            f"{path} is an adapter, no base: give the directory of the model that it was trained on"
        )
    return read_json(path if path.is_file() else path / "config.json")


def _from_hub(path: Path) -> str:
    """Say how to get what may be a name on the hub."""
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", ".."):
        return ""
    return f", such as `hf download {path} --local-dir {path.name}` makes"


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
        check_stored_sizes(model_shape(config), as_plain(files))
    return with_own_head(config, files)


# What layer_types says of a layer: without and with a window.
LAYER_KINDS = ("full_attention", "sliding_attention")


def hidden_size_of(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size of a configuration of whatever family, None where it has none."""
    config = language_config(config)
    return None if config.get("hidden_size") is None else whole_number(config, "hidden_size")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the row of a configuration; ValueError for a family that is not in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = why_not_yet(model_type) if isinstance(model_type, str) else ""
        raise ValueError(
            f"config.json model_type is {model_type!r:.100}: {why and why + '; '}supported are "
            f"{', '.join(sorted(FAMILIES))}; or, for recommendations, the sizes as "
            "Megatron's flags"
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
    config = language_config(config)
    for name, supported in {"hidden_act": "silu", **family.refused}.items():
        if config.get(name, supported) not in (supported, None):
            return (
                f"config.json {name} is {config[name]!r:.100}, {family.model_type} is supported "
                f"with {supported!r} only"
            )
    if family.hybrid:
        return _hybrid_problem(config, family)
    if family.experts and (problem := router_problem(with_defaults(config), family.experts)):
        return problem
    kinds = [] if family.delta_net else config.get("layer_types") or []
    known = LAYER_KINDS if family.window_in_some else LAYER_KINDS[:1]
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        alone = f"{' and '.join(known)} alone {'are' if family.window_in_some else 'is'}"
        return f"config.json layer_types is {kinds!r:.100}: {alone} supported"
    return ""


def _hybrid_problem(config: Mapping[str, Any], family: Family) -> str:
    try:
        has_experts = EXPERTS in layer_kinds(config)
    except ValueError as error:
        return str(error)
    of_experts = family.experts if has_experts else None
    return router_problem(with_defaults(config), of_experts) if of_experts else ""


def attention_window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the tokens that one attends to, itself and those before it; None for all of these."""
    config = language_config(config)
    if not family.window_field or config.get(family.window_field) is None:
        return None
    return whole_number(config, family.window_field, size="max_position_embeddings")


def layers_with_window(config: Mapping[str, Any], family: Family) -> list[int]:
    """Say of each layer whether it has the window: 0 or 1; nothing in a family without windows.

    Raises ValueError where config.json does not say it of each.
    """
    if not family.window_field:
        return []
    count = whole_number(config, "num_hidden_layers", size="num_layers")
    has_window = attention_window(config, family) is not None
    if not family.window_in_some:
        return [int(has_window)] * count
    kinds = config.get("layer_types") or [LAYER_KINDS[1 - layer % 2] for layer in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ValueError(
            f"config.json layer_types is {kinds!r:.100}: must be a list of "
            f"{' or '.join(LAYER_KINDS)} for each of {count:,} layers"
        )
    windows = [int(kind == LAYER_KINDS[1]) for kind in kinds]
    if any(windows) and not has_window:
        raise ValueError(
            f"config.json {family.window_field} is null, and layer_types has {LAYER_KINDS[1]}: "
            "give the tokens that one attends to there"
        )
    return windows


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the numbers that transformers takes for fields it has not.

    Of a multimodal model, that of its language model.
    """
    return {**family_of(config).defaults, **language_config(config)}


def model_shape(config: Mapping[str, Any], *, name: str = "") -> ModelShape:
    """Return the sizes of a configuration of any family in the table.

    name: for people; that of config.json by default.
    Raises ValueError, by field and value, for what is missing or impossible.
    """
    family = family_of(config)
    try:
        attention_window(config, family)
        stored_predictions(config)
        shape = _shape(with_defaults(config), family, name)
        layers_with_window(with_defaults(config), family)
        return shape
    except ValueError as error:
        sentence = str(error).removeprefix("config.json ")
        raise ValueError(f"config.json {sentence}") from None


def _shape(config: Mapping[str, Any], family: Family, name: str) -> ModelShape:
    heads, hidden = whole_number(config, "num_attention_heads"), whole_number(config, "hidden_size")
    attention = latent_sizes if family.latent else _attention_sizes
    # Where all layers have experts, some families have no number for others.
    other = (family.experts.size,) if family.experts and family.experts.in_all_layers else ()
    return ModelShape(
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=whole_number(config, "vocab_size"),
        ffn_hidden_size=whole_number(config, "intermediate_size", *other, size="ffn_hidden_size"),
        attention_output_gate=family.output_gate,
        qk_layernorm=switch(config, family.qk_norm_field, default=family.qk_norm),
        add_qkv_bias=switch(config, family.qkv_bias_field, default=family.qkv_bias),
        add_bias_linear=family.bias,
        softmax_type="learnable" if family.softmax_offsets else "vanilla",
        tied_embeddings=switch(config, "tie_word_embeddings", default=family.tied),
        family=family.rate.name,
        name=name or str(config.get("_name_or_path") or family.model_type),
        model_type=family.model_type,
        unmapped=mapping_problem(config, family) or rope_problem(config),
        **attention(config, heads, hidden),
        **(delta_sizes(config) if family.delta_net else {}),
        **_layers(config, family),
    )


def _layers(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return how many layers there are, of which kinds, and the sizes of what is in them."""
    if family.hybrid:
        found = {**hybrid_sizes(config), "gated_linear_unit": False}
        has_experts = EXPERTS in found["hybrid_layer_pattern"]
    else:
        found = {"num_layers": whole_number(config, "num_hidden_layers", size="num_layers")}
        has_experts = True
    of_experts = expert_sizes(config, family.experts) if family.experts and has_experts else {}
    return {**found, **of_experts}


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
