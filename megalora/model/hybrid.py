"""A HybridModel that equals a GPT model: its pattern of layers, and its modules' names there.

A layer of a GPT model is two of a HybridModel's: attention, then an MLP or experts. Where a pattern
has nothing but such pairs, adapters have the GPT model's names and sizes, so that checkpoints,
exports and start values are the same both ways.
"""

import functools
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from megalora.model.shape import ModelShape

_ATTENTION = {"*": "attention", "+": "latent attention"}
_MLP = {"-": "an MLP", "E": "experts"}
_OTHERS = {"M": "Mamba", "G": "a gated delta net", "D": "sparse attention"}
_STAGE, _PREDICTED = "|", "/"
_LAYER = re.compile(r"(decoder\.layers)\.(\d+)(?=\.|$)")
_PREDICTING = re.compile(r"(?<=\.mtp_model_layer)\.layers\.\d+")
_NORMS = ("decoder.final_norm", "decoder.final_layernorm")


class Chunk(Protocol):
    """A model chunk of Megatron's, by what is looked at here."""

    @property
    def config(self) -> object:
        """Its TransformerConfig."""
        ...


def pattern_of(shape: ModelShape, *, stages: int = 1, predictions: int = 0) -> str:
    """Return the pattern of the HybridModel that equals a GPT model, cut into pipeline stages.

    predictions: layers behind the decoder's that predict one token more (`mtp_num_layers`).
    Raises ValueError where the GPT model's layers cannot be dealt out evenly.
    """
    attention = "+" if shape.multi_latent_attention else "*"
    pairs = [attention + ("E" if is_moe else "-") for is_moe in shape.moe_pattern]
    if stages < 1:
        raise ValueError(f"pipeline_model_parallel_size is {stages}: must be 1 or more")
    each, rest = divmod(len(pairs), stages)
    if rest:
        raise ValueError(
            f"pipeline_model_parallel_size {stages} does not divide the {len(pairs)} layers of the "
            f"model: give --hybrid-layer-pattern {''.join(pairs)!r} with {_STAGE} between stages"
        )
    cut = range(0, len(pairs), each)
    decoder = _STAGE.join("".join(pairs[first : first + each]) for first in cut)
    return decoder + (_PREDICTED + pairs[-1]) * predictions


def layers_of(pattern: str) -> str:
    """Return a pattern without its pipeline stages."""
    return pattern.replace(_STAGE, "")


def mismatch(pattern: str) -> str:
    """Say in which layer a HybridModel differs from every GPT model; empty where it equals one."""
    (layers, *behind) = layers_of(pattern).split(_PREDICTED)
    whose = f"hybrid_layer_pattern is {pattern!r:.200}, whose"
    for number, kind in enumerate(layers):
        is_first = number % 2 == 0
        if kind in (_ATTENTION if is_first else _MLP):
            continue
        layer = f"{whose} layer {number}"
        if kind not in _ATTENTION | _MLP:
            return f"{layer} is {_named(kind)}, which no family here has"
        wanted = " or ".join(map(_named, _ATTENTION if is_first else _MLP))
        return f"{layer} is {_named(kind)}, where a family has {wanted}"
    if len(layers) % 2:
        wanted = " or ".join(map(_named, _MLP))
        return f"{whose} last layer is {_named(layers[-1])}, behind which a family has {wanted}"
    for part in behind:
        if part != layers[-2:]:
            return (
                f"{whose} part {part!r} behind {_PREDICTED} predicts one token more, where a "
                f"family has {layers[-2:]!r}"
            )
    return ""


def _named(kind: str) -> str:
    known = {**_ATTENTION, **_MLP, **_OTHERS}
    return f"{known[kind]} ({kind})" if kind in known else repr(kind)


def refuse_other(pattern: str | None) -> None:
    """Raise ValueError for a HybridModel that equals no GPT model, naming the layer."""
    if pattern and (problem := mismatch(pattern)):
        raise ValueError(
            f"{problem}: it has no Hugging Face form; keep the adapter as --save's checkpoint, or "
            "write W + c B A by --save-merged"
        )


@functools.cache
def equals_gpt(pattern: str | None) -> bool:
    """Say whether a pattern is that of a HybridModel which equals a GPT model."""
    return bool(pattern) and not mismatch(pattern)


def as_gpt(fields: Mapping[str, Any], pattern: str | None) -> dict[str, Any]:
    """Return a model's sizes, by Megatron's names, as those of the GPT model that it equals.

    fields: of a TransformerConfig, or Megatron's args. They stay where it equals none.
    """
    if not pattern or not equals_gpt(pattern):
        return dict(fields)
    layers = layers_of(pattern).partition(_PREDICTED)[0]
    moe_pattern = [int(kind == "E") for kind in layers[1::2]]
    changed: dict[str, Any] = {
        "num_layers": len(moe_pattern),
        "moe_layer_freq": moe_pattern,
        "multi_latent_attention": "+" in layers,
        "hybrid_layer_pattern": None,
    }
    if not any(moe_pattern):
        changed |= {"num_moe_experts": None, "num_experts": None}
    return {**fields, **changed}


def pattern_in(chunk: object) -> str:
    """Return the pattern of a model chunk, with its pipeline stages; empty for a GPT model's."""
    return getattr(chunk, "hybrid_layer_pattern", None) or ""


def config_of(chunk: Chunk) -> Any:
    """Return a model chunk's configuration, as that of the GPT model which it equals, if any."""
    return SimpleNamespace(**as_gpt(vars(chunk.config), pattern_in(chunk)))


def gpt_name(name: str, pattern: str | None) -> str:
    """Return a module's or parameter's global name in the GPT model that a HybridModel equals.

    It stays as it is where it equals none.
    """
    if not equals_gpt(pattern):
        return name
    name = name.replace(*_NORMS, 1) if name.startswith(_NORMS[0] + ".") else name
    name = _PREDICTING.sub("", name, count=1)
    return _LAYER.sub(lambda found: f"{found[1]}.{int(found[2]) // 2}", name, count=1)
