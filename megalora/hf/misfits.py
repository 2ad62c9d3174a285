"""Why modules of an adapter are not among those of a base, as far as their names tell."""

import re
from collections.abc import Collection, Iterable

from megalora.hf.linears import linears
from megalora.model.families import FAMILIES, names_of
from megalora.model.family import without_numbers
from megalora.model.shape import ModelShape
from megalora.printable import printable

_OTHER_TOWER = re.compile(r"\b(visual|vision\w*|image\w*|audio\w*|multi_modal\w*|mm_\w+)\b")
# Qwen2-MoE's, which PEFT's `all-linear` takes for one more linear.
_GATE = re.compile(r"\.shared_expert_gate$")
_FUSED = re.compile(r"\b(qkv_proj|gate_up_proj|query_key_value|c_attn|W_pack)$")


def why_not_in_model(names: Iterable[str], shape: ModelShape) -> str:
    """Return `why_not` of a base whose sizes alone are known."""
    own, names = names_of(shape.model_type), list(names)
    known = [name for linear in linears(own).values() for name in linear.modules]
    family = FAMILIES.get(shape.model_type)
    behind = own.layer.format(shape.num_layers)
    if family and family.prediction_field and any(name.startswith(behind) for name in names):
        return (
            f"{behind}* predicts one token more, a layer that transformers and PEFT leave out, and "
            "that has no adapter here"
        )
    return _why(names, set(known), shape.num_layers)


def why_not(names: Iterable[str], known: Iterable[str]) -> str:
    """Return the cause, and what to do, where an adapter has modules that its base has not.

    names: of these modules. known: of all modules of the base.
    """
    split = [without_numbers(name) for name in known]
    layers = [numbers[0] for pattern, numbers in split if numbers and "layers.{}." in pattern]
    return _why(list(names), {pattern for pattern, _ in split}, max(layers, default=-1) + 1)


def _why(names: list[str], known: Collection[str], num_layers: int) -> str:
    first = next((name for name in names if _OTHER_TOWER.search(name)), None)
    if first is not None:
        return (
            f"{printable(first, 200)} is of the part for images or sound of a multimodal model: "
            "train an adapter of the language model alone"
        )
    if fused := next((name for name in names if _FUSED.search(name)), None):
        return (
            f"{printable(fused, 200)} is several projections in one, which the base has apart: it "
            "was trained on another implementation of the model"
        )
    if gate := next((name for name in names if _GATE.search(name)), None):
        return (
            f"{printable(gate, 200)} is a shared expert's gate, a vector in Megatron, which has no "
            "adapter: merge the adapter into its base (megalora merge) and give the result as the "
            "base, or train one without it (exclude_modules of PEFT)"
        )
    return _prefix(names, known) or _size(names, known, num_layers) or "it belongs to another model"


def _prefix(names: list[str], known: Collection[str]) -> str:
    """Find the same modules under another prefix."""
    own = {pattern.partition("layers.{}.")[0] for pattern in known if "layers.{}." in pattern}
    for name in names:
        prefix, layers, rest = without_numbers(name)[0].partition("layers.{}.")
        for wanted in sorted(own - {prefix}):
            if layers and f"{wanted}{layers}{rest}" in known:
                return (
                    f"its modules' names start with {printable(prefix, 100)!r}, the base's with "
                    f"{wanted!r}, and fit but for that: it was trained on another class of the "
                    "model: rename its tensors, or train it on this one"
                )
    return ""


def _size(names: list[str], known: Collection[str], num_layers: int) -> str:
    """Find layers, of modules that the base has, behind its last one."""
    split = [without_numbers(name) for name in names]
    layers = [numbers[0] for pattern, numbers in split if pattern in known and numbers]
    if max(layers, default=-1) < num_layers:
        return ""
    return (
        f"it has adapters up to layer {max(layers)}, the base has {num_layers} layers: it was "
        "trained on a larger model"
    )
