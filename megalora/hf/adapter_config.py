"""The adapter_config.json that makes PEFT load what is written, and servers too."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megalora.hf.factors import LoRAFactors
from megalora.hf.patterns import matches
from megalora.hf.peft_config import choose_patterns, layer_of, most_common, target_modules
from megalora.hf.peft_experts import Experts
from megalora.hf.stacked_experts import from_tinker_projection
from megalora.hf.uniform import largest_rank
from megalora.model.family import Names, without_numbers

_CONSTANT_FIELDS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


@dataclass(frozen=True, slots=True)
class AdaptedBase:
    """What is known of the base: its layers, those of them that may have experts, if any do.

    delta_layers: those that are gated delta nets, and do not attend.
    """

    num_layers: int
    moe_layers: list[int]
    is_moe: bool
    names: Names
    delta_layers: list[int]

    def num_with(self, place: str) -> int:
        """Return the layers that have a module, by its name there, where all are alike."""
        if self.names.adapted != "model.":
            # What is beside the language model may have modules of the same name.
            return 0
        if place.startswith("linear_attn."):
            return len(self.delta_layers)
        attending = place.startswith("self_attn.")
        return self.num_layers - (len(self.delta_layers) if attending else 0)


def adapter_config(
    dense: Mapping[str, LoRAFactors], experts: Experts | None, format: str, base: AdaptedBase
) -> dict[str, Any]:
    """Return what a format's configuration says of these adapters, but for the base's name."""
    wanted, default = _ranks(dense, experts, format)
    if format == "tinker":
        return _fields(*default, target_modules="all-linear")
    rank_pattern, alpha_pattern = choose_patterns(wanted, default)
    by_weight = _wrapped_by_weight(dense, base)
    rank_pattern, alpha_pattern = (_of_weights(p, by_weight) for p in (rank_pattern, alpha_pattern))
    targets = target_modules([name for name in dense if name not in by_weight], base.num_with)
    parameters = [f"{base.names.as_loaded(name)}.weight" for name in by_weight]
    if experts:
        infix = experts.prefixes[0].split(".", 3)[3]
        places = _places_of_parameters(experts, infix, format, base)
        parameters += [f"{place}.{name}" for place in places for name in base.names.parameters]
        count = experts.num_stacked
        if places and count > 1:
            pattern = re.escape(f"{infix}.{base.names.parameters[0]}")
            rank_pattern[pattern] = count * default[0]
            alpha_pattern[pattern] = _whole(count * default[1])
        if not places:
            targets += experts.names.projections
    if format == "uniform":
        # SGLang serves no module that is not named here, and knows w1, w3 and w2 as keys alone.
        targets += [name.rpartition(".")[2] for name in by_weight if not _is_router(name, base)]
        targets = [from_tinker_projection(name) for name in targets]
    rank_pattern, alpha_pattern = (_both(p, base.names) for p in (rank_pattern, alpha_pattern))
    return _fields(
        *default,
        rank_pattern=_of_whole(rank_pattern, base.names),
        alpha_pattern=_of_whole(alpha_pattern, base.names),
        target_modules=sorted({base.names.as_adapted(name) for name in targets}),
        target_parameters=[base.names.as_adapted(name) for name in parameters] or None,
    )


def _of_whole(patterns: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Let patterns of whole names match what adapters call these."""
    start, adapted = re.escape("model."), re.escape(names.adapted)
    return {
        f"{adapted}{pattern.removeprefix(start)}" if pattern.startswith(start) else pattern: value
        for pattern, value in patterns.items()
    }


def _ranks(
    dense: Mapping[str, LoRAFactors], experts: Experts | None, format: str
) -> tuple[dict[str, tuple[int, float]], tuple[int, float]]:
    """Return (rank, alpha) of each module outside of the experts, and of all that are not named."""
    wanted = {name: (module.rank, _alpha(module)) for name, module in dense.items()}
    of_experts = experts.factors if experts else {}
    if format == "uniform":
        rank = largest_rank([*dense.values(), *of_experts.values()])
        return dict.fromkeys(dense, (rank, rank)), (rank, rank)
    if experts:
        # NOTE: PEFT takes the rank of stacked experts from `r` and ignores patterns there, so `r`
        # is the expert rank wherever there are experts.
        return wanted, (experts.rank, _alpha(next(iter(of_experts.values()))))
    return wanted, most_common(wanted.values())


def _places_of_parameters(
    experts: Experts, infix: str, format: str, base: AdaptedBase
) -> list[str]:
    """Return what holds the experts' parameters that are named; empty where modules are.

    Names of modules are those of all layers with experts.
    """
    whole = {layer_of(prefix) for prefix in experts.prefixes} == set(base.moe_layers)
    if format == "uniform":
        return []
    if format == "peft" and whole and not base.names.experts_by_parameters:
        return []
    places = [f".{infix}"] if whole else experts.prefixes
    return [base.names.as_loaded(place).removeprefix(".") for place in places]


def _fields(rank: int, alpha: float, **others: object) -> dict[str, Any]:
    return {**_CONSTANT_FIELDS, "r": rank, "lora_alpha": alpha, **others}


def _wrapped_by_weight(modules: Collection[str], base: AdaptedBase) -> list[str]:
    """Return the modules that PEFT with transformers 5 reaches by their weights only.

    Beside experts it takes the names of a dense MLP, and of shared experts, for theirs and drops
    them, and a router is no linear. The names in the file are the same.
    """
    taken = base.is_moe and not base.names.experts_by_parameters
    ends = tuple(f".{name}" for name in base.names.projections) if taken else ()
    wrapped = [name for name in modules if _is_router(name, base) or name.endswith(ends)]
    return sorted(wrapped, key=lambda name: (layer_of(name) or 0, name))


def _is_router(name: str, base: AdaptedBase) -> bool:
    return without_numbers(name)[0] in base.names.in_layer("mlp.router")


def _of_weights(patterns: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Let the patterns of these modules match the names of their weights too."""
    return {
        rf"{pattern}(\.weight)?"
        if any(matches(pattern, name) for name in names)
        else pattern: value
        for pattern, value in patterns.items()
    }


def _both(patterns: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Let patterns match what files call a module, and what transformers' class does."""
    found = dict(patterns)
    for stored, loaded in names.loaded_as.items():
        one, other = re.escape(stored), re.escape(loaded)
        found = {p.replace(one, f"({one}|{other})"): value for p, value in found.items()}
    return found


def _alpha(module: LoRAFactors) -> float:
    return _whole(module.scale * module.rank)


def _whole(value: float) -> float:
    """Return a number as an integer where only rounding keeps it from being one."""
    return round(value) if abs(value - round(value)) <= 1e-12 * abs(value) else value
