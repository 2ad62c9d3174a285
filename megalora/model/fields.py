"""The one reader of the numbers and switches of a config.json: their types and their bounds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megalora.model.shape import MAX_SIZES


def whole_number(
    config: Mapping[str, Any],
    *names: str,
    size: str = "",
    low: int = 1,
    default: int | None = None,
) -> int:
    """Return the first of these fields that is not null, an integer from `low` on.

    size: which of `shape.MAX_SIZES` bounds it; the first name by default. Raises ValueError, by
    field, value and bounds.
    """
    found = next((name for name in names if config.get(name) is not None), None)
    value = default if found is None else config[found]
    high = MAX_SIZES[size or names[0]]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"config.json {found or names[0]} is {value!r:.100}: must be an integer >= {low}, "
            f"{high:,} at most"
        )
    return value


def real_number(config: Mapping[str, Any], name: str, *, low: float, high: float) -> float | None:
    """Return a field that is a number between two bounds, None where it is null or missing."""
    value = config.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(
            f"config.json {name} is {value!r:.100}: must be a number from {low:g} to {high:g}"
        )
    return value


def switch(config: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """Return a field that is true or false, the default where it is null or missing."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"config.json {name} is {value!r:.100}: must be true or false")
    return value


def kinds_of_layers(kinds: object, name: str, known: Sequence[str], count: int) -> list[int]:
    """Return the number of each layer's kind among those that are known.

    Raises ValueError, by the field's name, for anything but a list of a known kind for each layer.
    """
    is_list = isinstance(kinds, list) and all(kind in known for kind in kinds)
    if not isinstance(kinds, list) or not is_list or len(kinds) != count:
        raise ValueError(
            f"config.json {name} is {kinds!r:.100}: must be a list of {' or '.join(known)} for "
            f"each of {count:,} layers"
        )
    return [known.index(kind) for kind in kinds]
