"""The rotary embedding of a config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalora.model.fields import real_number

# Megatron hard-codes these parameters of Llama 3's rope scaling.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: its base, and the factor of Llama 3's scaling (1 where there is none)."""

    theta: float
    factor: float


def rope(config: Mapping[str, Any]) -> Rope:
    """Return the rotary embedding of a configuration, old and new spelling.

    Raises ValueError for scalings other than Llama 3's, and for other parameters of it.
    """
    # transformers 5 has rope_parameters, earlier ones rope_theta and rope_scaling.
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise ValueError(f"config.json rope_scaling is {values!r:.100}: must be an object")
    given = [real_number(place, "rope_theta", low=1, high=1e15) for place in (values, config)]
    theta = float(next(filter(None, given), 10000.0))
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return Rope(theta, 1.0)
    if kind != "llama3":
        raise ValueError(
            f"config.json rope_type is {kind!r:.100}: supported are 'default' and 'llama3'; remove "
            "the scaling where sequences are no longer than the model was trained with"
        )
    for name, supported in _LLAMA3_ROPE.items():
        if values.get(name, supported) != supported:
            raise ValueError(
                f"config.json {name} of the llama3 rope is {values[name]!r:.100}: Megatron has it "
                f"fixed at {supported}"
            )
    return Rope(theta, float(real_number(values, "factor", low=1, high=1e6) or 8.0))


def rope_problem(config: Mapping[str, Any]) -> str:
    """Say why Megatron cannot have a configuration's rotary embedding; empty where it can."""
    try:
        rope(config)
    except ValueError as error:
        return str(error)
    return ""
