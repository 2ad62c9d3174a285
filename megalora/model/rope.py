"""The rotary embedding of a config.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megalora.model.families import FAMILIES
from megalora.model.family import Family
from megalora.model.fields import real_number, switch, whole_number
from megalora.model.multimodal import language_config

# Megatron hard-codes these parameters of Llama 3's rope scaling.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN's numbers by config.json's names; attention's scores are scaled by mscale_all_dim.

    truncate: where the scaling begins and ends is rounded to whole features.
    """

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding.

    theta: its base. factor: of Llama 3's scaling, 1 where there is none. part: of a head's
    features, the first of which are rotated. yarn: None where it is not scaled so.
    """

    theta: float
    factor: float
    part: float = 1.0
    yarn: Yarn | None = None


def rope(config: Mapping[str, Any]) -> Rope:
    """Return the rotary embedding of a configuration, old and new spelling.

    Raises ValueError for scalings that Megatron has not for the family, and for parameters of
    theirs that it has not.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    config = {**(family.defaults if family else {}), **language_config(config)}
    # transformers 5 has rope_parameters, earlier ones rope_theta and rope_scaling. Where both are
    # there it prefers the latter, and nothing of the former counts, theta neither.
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(field) or (family.defaults.get(field) if family else None) or {}
    if not isinstance(values, dict):
        raise ValueError(f"config.json {field} is {values!r:.100}: must be an object")
    _check_one_for_all(field, values)
    part = _rotated_part(values, config, family)
    given = [real_number(place, "rope_theta", low=1, high=1e15) for place in (values, config)]
    theta = float(next(filter(None, given), 10000.0))
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return Rope(theta, 1.0, part)
    scalings = family.rope_scalings if family else ("llama3",)
    if kind not in scalings:
        known = " and ".join(repr(name) for name in ("default", *scalings))
        raise ValueError(
            f"config.json rope_type is {kind!r:.100} in {field}: supported are {known}; remove the "
            "scaling where sequences are no longer than the model was trained with"
        )
    if kind == "mrope":
        # Of a text all three positions of a token are one.
        return Rope(theta, 1.0, part)
    if kind == "yarn":
        truncates = bool(family and family.latent)
        return Rope(theta, 1.0, part, _yarn(values, config, truncates=truncates))
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


def _yarn(values: Mapping[str, Any], config: Mapping[str, Any], *, truncates: bool) -> Yarn:
    """Return YaRN's numbers as transformers takes them, for one that Megatron has.

    Its cosines and sines are multiplied with mscale's factor over mscale_all_dim's.
    truncates: Megatron rounds where it begins and ends, whatever is asked for.
    """
    alone = {"attention_factor": None, **({"truncate": True} if truncates else {})}
    for name, supported in alone.items():
        if values.get(name, supported) != supported:
            raise ValueError(
                f"config.json {name} of the yarn rope is {values[name]!r:.100}: Megatron computes "
                f"it as where it is {json.dumps(supported)}"
            )
    factor = _number(values, "factor", low=1)
    if not factor:
        raise ValueError("config.json factor of the yarn rope is missing")
    mscale, all_dim = _number(values, "mscale"), _number(values, "mscale_all_dim")
    if all_dim and not mscale:
        raise ValueError(
            f"config.json mscale of the yarn rope is missing beside mscale_all_dim {all_dim:g}: "
            "Megatron has the one with the other only"
        )
    return Yarn(
        factor=factor,
        original_max_position_embeddings=_original_length(values, config),
        beta_fast=_number(values, "beta_fast") or 32.0,
        beta_slow=_number(values, "beta_slow") or 1.0,
        # One alone is not looked at.
        mscale=mscale if mscale and all_dim else 1.0,
        mscale_all_dim=all_dim,
        # null is no.
        truncate=switch(values, "truncate", default="truncate" not in values),
    )


def _number(values: Mapping[str, Any], name: str, *, low: float = 0) -> float:
    return float(real_number(values, name, low=low, high=1e6) or 0)


def _original_length(values: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    name, size = "original_max_position_embeddings", "max_position_embeddings"
    if config.get(name) is None and values.get(name) is not None:
        return whole_number(values, name, size=size)
    return whole_number(config, name, size, size=size)


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


def yarn_args(yarn: Yarn) -> dict[str, Any]:
    """Return Megatron's arguments for an embedding that is scaled so, but that of latents."""
    return {
        "position_embedding_type": "yarn",
        **_numbers_of(yarn),
        # The fused kernel does not know of the size of cosines, and packed sequences do not ask.
        "apply_rope_fusion": False,
    }


def yarn_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Megatron's configuration has of the YaRN that arguments ask for, by its names."""
    if args["position_embedding_type"] != "yarn":
        return {}
    return {f"yarn_{name.removeprefix('yarn_')}": args[name] for name in _numbers_of(Yarn())}


def _numbers_of(yarn: Yarn) -> dict[str, Any]:
    return {
        "rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_position_embeddings,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "yarn_correction_range_round_to_int": yarn.truncate,
    }


def yarn_fields(theta: float, yarn: Yarn | None) -> dict[str, Any]:
    """Return the fields of a config.json for a rotary embedding that is scaled so, or not."""
    if yarn is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **asdict(yarn)}}


def rope_without_flags(config: Mapping[str, Any]) -> str:
    """Say which numbers of a rotary embedding Megatron has no flags for; empty where it has."""
    family = FAMILIES.get(str(config.get("model_type")))
    own, default = rope(config).yarn if family and family.latent else None, Yarn()
    names = ("beta_fast", "beta_slow", "original_max_position_embeddings")
    others = [name for name in names if own and getattr(own, name) != getattr(default, name)]
    return " and ".join(f"{name} {getattr(own, name):g}" for name in others)


def rope_problem(config: Mapping[str, Any]) -> str:
    """Say why Megatron cannot have a configuration's rotary embedding; empty where it can."""
    try:
        rope(config)
    except ValueError as error:
        return str(error)
    return ""
