"""The table of families: each file here has rows, FAMILIES, and no other place has any.

A new family is a row in the file of its relatives, or a file of its own.
"""

import pkgutil
from importlib import import_module

from megalora.model.family import DEFAULT_NAMES, Family, Names


def find_families() -> dict[str, Family]:
    """Return the rows of all files in this folder by config.json's model_type."""
    files = [import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return {family.model_type: family for file in files for family in file.FAMILIES}


FAMILIES = find_families()


def names_of(model_type: str) -> Names:
    """Return Hugging Face's names in a family, those of most families where it is not known."""
    family = FAMILIES.get(model_type)
    return family.names if family else DEFAULT_NAMES


def spellings(name: str) -> set[str]:
    """Return a module's name, and what a family calls it in memory or in files."""
    families = [family.names for family in FAMILIES.values() if family.names is not None]
    return {name, *(n.as_loaded(name) for n in families), *(n.as_stored(name) for n in families)}


def rate_exponents() -> dict[str, float]:
    """Return the exponents of the learning rate rule by the families that it was fitted to."""
    rates = [family.rate for family in FAMILIES.values()]
    return {rate.name: rate.exponent for rate in rates if rate.exponent is not None}
