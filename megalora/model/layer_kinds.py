"""Layers of one kind each (Nemotron-H): which of a config.json's is of which, and Mamba-2's sizes.

Published files spell the kinds as letters, transformers as words.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalora.model.fields import whole_number
from megalora.model.shape import MAX_SIZES, ModelShape

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

MAMBA, ATTENTION, MLP, EXPERTS = "M", "*", "-", "E"
KINDS = MAMBA + ATTENTION + MLP + EXPERTS
LETTERS_FIELD, WORDS_FIELDS = "hybrid_override_pattern", ("layers_block_type", "layer_types")
_WORDS = {
    "linear_attention": MAMBA,
    "full_attention": ATTENTION,
    "mlp": MLP,
    "moe": EXPERTS,
    # Of earlier versions.
    "mamba": MAMBA,
    "attention": ATTENTION,
}
# Megatron's name of a size -> config.json's.
SIZES = {
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
}


def layer_kinds(config: Mapping[str, Any]) -> str:
    """Return the kind of each layer, by Megatron's letters.

    As transformers, which prefers words, and counts layers by them. Raises ValueError where there
    is neither, and for kinds that Megatron has not.
    """
    words_field = next((name for name in WORDS_FIELDS if config.get(name) is not None), None)
    words = config[words_field] if words_field else None
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        pattern = "".join(_WORDS.get(word, "?") for word in words)
    else:
        pattern = config.get(LETTERS_FIELD) if words is None else words
    field = words_field or LETTERS_FIELD
    limit = MAX_SIZES["num_layers"]
    if not isinstance(pattern, str) or not 0 < len(pattern) <= limit or set(pattern) - set(KINDS):
        raise ValueError(
            f"config.json {field} is {config.get(field)!r:.200}: must have a letter of "
            f"{', '.join(KINDS)} for each layer, or a list of {', '.join(_WORDS)}, {limit:,} at "
            "most"
        )
    if MAMBA not in pattern:
        raise ValueError(
            f"config.json {field} is {config.get(field)!r:.200}: without a layer of Mamba-2 it is "
            "none of this family's models"
        )
    return pattern


def hybrid_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelShape` for layers of one kind each, and for Mamba-2."""
    pattern = layer_kinds(config)
    found: dict[str, Any] = {
        name: whole_number(config, field, size=name) for name, field in SIZES.items()
    }
    found |= {"hybrid_layer_pattern": pattern, "num_layers": len(pattern)}
    if config.get("moe_latent_size") is not None:
        found["moe_latent_size"] = whole_number(config, "moe_latent_size")
    return found


def mamba_args(shape: ModelShape) -> dict[str, Any]:
    """Return Megatron's arguments for what `hybrid_sizes` gives, but for the layers' kinds."""
    args: dict[str, Any] = {name: getattr(shape, name) for name in SIZES}
    if shape.num_moe_experts and shape.moe_latent_size:
        args["moe_latent_size"] = shape.moe_latent_size
    return args


def mamba_sizes(built: "TransformerConfig", pattern: str) -> dict[str, int]:
    """Return the sizes of a Megatron model's layers of Mamba-2; empty where there are none."""
    if MAMBA not in pattern:
        return {}
    sizes = {name: getattr(built, name) for name in SIZES}
    heads = sizes["mamba_num_heads"] or 2 * built.hidden_size // built.mamba_head_dim
    return {**sizes, "mamba_num_heads": heads}


def hybrid_fields(built: "TransformerConfig", pattern: str) -> dict[str, Any]:
    """Return the fields of a config.json for the layers of a Megatron model."""
    return {
        LETTERS_FIELD: pattern,
        **{field: getattr(built, name) for name, field in SIZES.items()},
        "moe_latent_size": getattr(built, "moe_latent_size", None),
        # transformers lets no step be shorter than this, which Megatron does.
        "time_step_min": 1e-9,
    }
