"""The rotary embedding of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalora.model.families import FAMILIES
from megalora.model.family import Family
from megalora.model.fields import real_number

# Megatron hard-codes these parameters of Llama 3's rope scaling.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding.

    theta: its base. factor: of Llama 3's scaling, 1 where there is none. part: of a head's
    features, the first of which are rotated.
    """

    theta: float
    factor: float
    part: float = 1.0


def rope(config: Mapping[str, Any]) -> Rope:
    """Return the rotary embedding of a configuration, old and new spelling.

    Raises ValueError for scalings other than Llama 3's, and for other parameters of it.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    config = {**(family.defaults if family else {}), **config}
    # transformers 5 has rope_parameters, earlier ones rope_theta and rope_scaling. Where both are
    # there it prefers the latter, and nothing of the former counts, theta neither.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config.json {field} is {values!r:.100}: must be an object")
    _check_one_for_all(field, values)
    part = _rotated_part(values, config, family)
    given = [real_number(place, "rope_theta", low=1, high=1e15) for place in (values, config)]
    theta = float(next(filter(None, given), 10000.0))
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return Rope(theta, 1.0, part)
    if kind != "llama3":
        raise ValueError(
            f"config.json rope_type is {kind!r:.100} in {field}: supported are 'default' and "
            "'llama3'; remove the scaling where sequences are no longer than the model was trained "
            "with"
        )
    return Rope(theta, _llama3_factor(values, config), part)


def _check_one_for_all(field: str, values: Mapping[str, Any]) -> None:
    if kinds := [name for name, value in values.items() if isinstance(value, dict)]:
        raise ValueError(
            f"config.json {field} has an embedding for each of {kinds!r:.100}: one for all layers "
            "is supported"
        )


def _rotated_part(
    values: Mapping[str, Any], config: Mapping[str, Any], family: Family | None
) -> float:
    name = "partial_rotary_factor"
    found = [real_number(place, name, low=0, high=1) for place in (values, config)]
    part = next((part for part in found if part is not None), 1.0)
    if part != 1 and not (family and family.partial_rotary):
        raise ValueError(f"config.json {name} is {part:g}: 1 is supported only")
    return float(part)


def _llama3_factor(values: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    # What transformers takes where the parameters have none, and always where config.json has one.
    original = "original_max_position_embeddings"
    lengths = (config.get(original), values.get(original), config.get("max_position_embeddings"))
    found = {**values, original: next((size for size in lengths if size is not None), None)}
    for name, supported in _LLAMA3_ROPE.items():
        if found.get(name) != supported:
            raise ValueError(
                f"config.json {name} of the llama3 rope is {found.get(name)!r:.100}: Megatron has "
                f"it fixed at {supported}"
            )
    factor = real_number(values, "factor", low=1, high=1e6)
    if factor is None:
        raise ValueError("config.json factor of the llama3 rope is missing")
    return float(factor)


def rope_problem(config: Mapping[str, Any]) -> str:
    """Say why Megatron cannot have a configuration's rotary embedding; empty where it can."""
    try:
        rope(config)
    except ValueError as error:
        return str(error)
    return ""
