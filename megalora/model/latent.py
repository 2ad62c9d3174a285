"""The multi-latent attention of a config.json in Megatron's words, both ways."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megalora.model.fields import whole_number
from megalora.model.rope import Rope, Yarn
from megalora.model.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.transformer import MLATransformerConfig

# Megatron's name of a size -> config.json's.
SIZES = {
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


def latent_sizes(config: Mapping[str, Any], heads: int, hidden_size: int) -> dict[str, Any]:
    """Return the fields of `ModelShape` for attention through latents, of `heads` heads.

    Raises ValueError, by field and value, for sizes that are missing or impossible.
    """
    groups = whole_number(config, "num_key_value_heads", size="num_query_groups", default=heads)
    if groups != heads:
        raise ValueError(
            f"config.json num_key_value_heads is {groups}: must be num_attention_heads, {heads}, "
            "where keys and values come from a latent"
        )
    sizes = {name: whole_number(config, field, size=name) for name, field in SIZES.items()}
    if sizes["qk_pos_emb_head_dim"] % 2:
        raise ValueError(
            f"config.json qk_rope_head_dim is {sizes['qk_pos_emb_head_dim']}: must be even, since "
            "pairs of features are rotated"
        )
    has_latent_query = config.get("q_lora_rank") is not None
    return {
        "num_query_groups": heads,
        # As Megatron counts it where nobody says it; it decides nothing.
        "kv_channels": max(1, hidden_size // heads),
        "multi_latent_attention": True,
        "q_lora_rank": whole_number(config, "q_lora_rank") if has_latent_query else 0,
        **sizes,
    }


def latent_args(shape: ModelShape, rotary: Rope) -> dict[str, Any]:
    """Return Megatron's arguments for attention through latents and its rotary embedding.

    What YaRN needs beside them has no flag: it is set when weights are loaded.
    """
    yarn = rotary.yarn or Yarn()
    args = {
        "multi_latent_attention": True,
        "q_lora_rank": shape.q_lora_rank or None,
        **{name: getattr(shape, name) for name in SIZES},
        "rope_type": "yarn" if rotary.yarn else "rope",
        "rotary_scaling_factor": yarn.factor,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
    # The fused kernel is YaRN's alone.
    return args if rotary.yarn else {**args, "apply_rope_fusion": False}


def latent_fields(built: "MLATransformerConfig", yarn: Yarn | None) -> dict[str, Any]:
    """Return the fields of a config.json for the attention of a Megatron model."""
    fields: dict[str, Any] = {field: getattr(built, name) for name, field in SIZES.items()}
    return {
        **fields,
        "q_lora_rank": built.q_lora_rank,
        "rope_theta": float(built.rotary_base),
        "rope_scaling": {"type": "yarn", **asdict(yarn)} if yarn else None,
    }
