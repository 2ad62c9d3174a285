"""A HybridModel that equals a GPT model: its pattern of layers, and its modules' names there.

A layer of a GPT model is two of a HybridModel's: attention, then an MLP or experts. Where a pattern
has nothing but such pairs, adapters have the GPT model's names and sizes, so that checkpoints,
exports and start values are the same both ways. A family whose layers are of one kind each
(Nemotron-H) has the HybridModel's layers, one for one, and their names.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from megalora.model.families import FAMILIES
from megalora.model.layer_kinds import KINDS, MAMBA
from megalora.model.shape import ModelShape

_ATTENTION = {"*": "attention", "+": "latent attention", "G": "a gated delta net"}
_MLP = {"-": "an MLP", "E": "experts"}
_OTHERS = {"M": "Mamba", "D": "sparse attention"}
# Megatron's arguments of a GPT model that a HybridModel's pattern says.
_OF_PATTERN = (
    "num_layers",
    "moe_layer_freq",
    "linear_attention_freq",
    "experimental_attention_variant",
)
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
    """Return the pattern of the HybridModel that a model is or equals, cut into pipeline stages.

    predictions: layers behind the decoder's that predict one token more (`mtp_num_layers`).
    Raises ValueError where the model's layers cannot be dealt out evenly.
    """
    if shape.hybrid_layer_pattern and predictions:
        raise ValueError(
            f"mtp_num_layers is {predictions}: of {shape.model_type} the layers that predict one "
            "token more are not loaded: leave --mtp-num-layers out"
        )
    attention = "+" if shape.multi_latent_attention else "*"
    kinds = zip(shape.delta_net_pattern, shape.moe_pattern, strict=True)
    pairs = [("G" if is_delta else attention) + ("E" if moe else "-") for is_delta, moe in kinds]
    if shape.hybrid_layer_pattern:
        pairs = list(shape.hybrid_layer_pattern)
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
            who = "Nemotron-H alone" if kind == MAMBA else "no family here"
            return f"{layer} is {_named(kind)}, which {who} has"
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


def is_own(pattern: str | None, model_type: str) -> bool:
    """Say whether a pattern is that of a model of this family, whose layers are of one kind each.

    So it has these layers' names, and no GPT model's.
    """
    family = FAMILIES.get(model_type)
    layers = layers_of(pattern or "")
    return bool(family and family.hybrid) and MAMBA in layers and not set(layers) - set(KINDS)


def refuse_other(pattern: str | None, model_type: str = "") -> None:
    """Raise ValueError for a HybridModel that equals no GPT model, naming the layer.

    model_type: of its family, whose models it may be.
    """
    if not pattern or is_own(pattern, model_type):
        return
    others = [kind for kind in layers_of(pattern) if kind not in KINDS]
    if is_own(MAMBA, model_type) and others:
        problem = f"hybrid_layer_pattern is {pattern!r:.200}, which has {_named(others[0])}"
    else:
        problem = mismatch(pattern)
    if problem:
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

    fields: of a TransformerConfig, or Megatron's args. Where it equals none they stay, with the
    pattern beside them.
    """
    if not pattern:
        return dict(fields)
    layers = layers_of(pattern).partition(_PREDICTED)[0]
    if not equals_gpt(pattern):
        return {**fields, "num_layers": len(layers), "hybrid_layer_pattern": layers}
    moe_pattern = [int(kind == "E") for kind in layers[1::2]]
    delta_pattern = [int(kind == "G") for kind in layers[0::2]]
    changed: dict[str, Any] = {
        "num_layers": len(moe_pattern),
        "moe_layer_freq": moe_pattern,
        "multi_latent_attention": "+" in layers,
        "hybrid_layer_pattern": None,
    }
    if fields.get("window_attn_skip_freq") is not None:
        windows = windows_of(fields["window_attn_skip_freq"], len(layers))
        changed["window_attn_skip_freq"] = windows[::2]
    if any(delta_pattern):
        changed["experimental_attention_variant"] = "gated_delta_net"
        changed["linear_attention_freq"] = delta_pattern
    if not any(moe_pattern):
        changed |= {"num_moe_experts": None, "num_experts": None}
    return {**fields, **changed}


def hybrid_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments of a GPT model for the HybridModel of twice the layers.

    Its pattern is left out.
    """
    args = {name: value for name, value in args.items() if name not in _OF_PATTERN}
    if windows := args.get("window_attn_skip_freq"):
        args["window_attn_skip_freq"] = [own for own in windows for _ in range(2)]
    return args


def windows_of(frequency: int | Sequence[int] | None, num_layers: int) -> list[int]:
    """Say of each layer whether it has a window, where some have: 0 or 1, as Megatron does."""
    if frequency is None:
        return [1] * num_layers
    if isinstance(frequency, int):
        return [int(number % frequency != 0) for number in range(1, num_layers + 1)]
    return [int(bool(each)) for each in frequency]


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
