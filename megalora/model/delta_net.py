"""The gated delta nets of a config.json in Megatron's words, both ways."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalora.model.fields import kinds_of_layers, whole_number
from megalora.model.shape import DELTA_SIZES, ModelShape

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

VARIANT = "gated_delta_net"
# Of a layer, by Megatron's 0 and 1.
_KINDS = ("full_attention", "linear_attention")
# transformers' own where config.json does not say of each layer what it is.
_INTERVAL = 4


def delta_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ModelShape` that say which layers are gated delta nets, and of them.

    Raises ValueError, by field and value, for sizes that are missing or impossible.
    """
    sizes = {name: whole_number(config, name) for name in DELTA_SIZES}
    return {"linear_attention_freq": _pattern(config), **sizes}


def delta_args(shape: ModelShape) -> dict[str, Any]:
    """Return Megatron's arguments for gated delta nets; none for a model without."""
    if not shape.linear_attention_freq:
        return {}
    return {
        "experimental_attention_variant": VARIANT,
        "linear_attention_freq": shape.delta_net_pattern,
        **{name: getattr(shape, name) for name in DELTA_SIZES},
    }


def delta_fields(built: "TransformerConfig") -> dict[str, Any]:
    """Return the fields of a config.json for the layers of a Megatron model, all of them."""
    pattern = ModelShape.from_mapping(vars(built)).delta_net_pattern
    return {
        "layer_types": [_KINDS[is_delta] for is_delta in pattern],
        **{name: getattr(built, name) for name in DELTA_SIZES},
    }


def _pattern(config: Mapping[str, Any]) -> list[int]:
    count = whole_number(config, "num_hidden_layers", size="num_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        interval = whole_number(
            config, "full_attention_interval", size="num_layers", default=_INTERVAL
        )
        return [int((layer + 1) % interval != 0) for layer in range(count)]
    return kinds_of_layers(kinds, "layer_types", _KINDS, count)


# Megatron's own defaults, transformer_config.py.
_DELTA_NET_SIZES = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def sizes_in_args(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes of a model's delta nets in Megatron's arguments; nothing without any.

    Raises ValueError where it is not said which layers they are.
    """
    if getattr(args, "experimental_attention_variant", None) != VARIANT:
        return {}
    frequency = getattr(args, "linear_attention_freq", None)
    if frequency is None:
        raise ValueError(
            "linear_attention_freq is missing: give --linear-attention-freq, as Megatron needs it "
            "with --experimental-attention-variant gated_delta_net"
        )
    given = {name: getattr(args, name, None) for name in _DELTA_NET_SIZES}
    return {
        "linear_attention_freq": frequency,
        **{name: given[name] or default for name, default in _DELTA_NET_SIZES.items()},
    }
