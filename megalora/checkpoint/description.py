"""What is stored with the adapters of a checkpoint, read back as the types that it has."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from megalora.config import LoRAConfig
from megalora.model.shape import MAX_SIZES
from megalora.reading import parse_json
from megalora.targets import ModelFacts

# Of a checkpoint's description of its adapters, and of what `megalora import-base` writes.
HUGGING_FACE = "hugging_face"
_SIZES = {"num_layers": int, "hidden_size": int, "vocab_size": int, "model_type": str}


def parse_description(text: object) -> dict[str, Any]:
    """Return a description of `config`, `model` and, where stored, `hugging_face` and `base`.

    Raises ValueError where one of them is not what `read_config`, `read_facts`, `read_sizes` and
    `megalora.checkpoint.base.differences` take.
    """
    value = parse_json(text) if isinstance(text, str | bytes) else None
    if not isinstance(value, dict):
        raise ValueError("the description of its adapters is no JSON object: it is not megalora's")
    read_config(value)
    read_facts(value)
    read_sizes(value)
    base = value.get("base")
    if base is not None and not _is_fingerprint(base):
        raise ValueError("the description of its adapters has a `base` that is no fingerprint")
    return value


def read_config(description: Mapping[str, Any]) -> LoRAConfig:
    """Return the configuration of the adapters."""
    stored = _part(description, "config")
    try:
        return LoRAConfig.from_dict(stored)
    except TypeError as error:
        raise ValueError(f"the configuration of its adapters is incomplete: {error}") from None


def read_facts(description: Mapping[str, Any]) -> ModelFacts:
    """Return the sizes of the model that the adapters were trained on."""
    stored = _part(description, "model")
    known = {field.name: field for field in fields(ModelFacts)}
    if unknown := sorted(set(stored) - set(known)):
        raise ValueError(f"the model of its adapters has the unknown fields {unknown!r:.200}")
    for name, value in stored.items():
        if not _fits(name, value, known[name].type):
            raise ValueError(f"the model of its adapters has {name} {value!r:.100}")
    try:
        return ModelFacts(**stored)
    except TypeError as error:
        raise ValueError(f"the model of its adapters is incomplete: {error}") from None


def read_sizes(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Hugging Face's files say of the base and `read_facts` does not.

    `num_layers`, `hidden_size`, `vocab_size` without Megatron's padding, `model_type`: each where
    it was known when the checkpoint was written, by a megalora that stores it.
    """
    stored = description.get(HUGGING_FACE, {})
    if not isinstance(stored, dict):
        raise ValueError(f"the base of its adapters is {stored!r:.100}: it is not megalora's")
    found = {name: stored[name] for name in _SIZES if name in stored}
    for name, value in found.items():
        if not _fits(name, value, _SIZES[name]):
            raise ValueError(f"the base of its adapters has {name} {value!r:.100}")
    return found


def _part(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = description.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"the description of its adapters has no `{name}`: it is not megalora's")
    return part


def _fits(name: str, value: object, kind: object) -> bool:
    by_layer = name in ("moe_layer_freq", "linear_attention_freq")
    if by_layer and isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) <= MAX_SIZES["num_layers"] and all(each in (0, 1) for each in value)
    if kind is int or by_layer:
        limit = MAX_SIZES.get(name, 2**24)
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit
    return isinstance(value, bool if kind is bool else str)


def _is_fingerprint(base: object) -> bool:
    weights = base.get("weights") if isinstance(base, dict) else None
    dtypes = base.get("dtypes") if isinstance(base, dict) else None
    if not isinstance(weights, dict) or not isinstance(dtypes, list):
        return False
    return all(isinstance(name, str) for name in dtypes) and all(
        isinstance(numbers, list)
        and len(numbers) == 3
        and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        for numbers in weights.values()
    )
