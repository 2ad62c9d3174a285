"""adapter_config.json: which rank and scale a module has, by PEFT's own rules, both ways."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalora.config import ALPHAS, RANKS, is_alpha, is_rank
from megalora.hf.factors import summarise
from megalora.hf.patterns import Patterns
from megalora.hf.peft_fields import check_fields, check_type

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftRules:
    """How adapter_config.json gives a module its rank and its scale.

    prefix: what the modules' names have for `model.` where PEFT matches them with patterns.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    prefix: str = "model."
    _ranks: Patterns[int] = field(init=False, repr=False, compare=False)
    _alphas: Patterns[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, values in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            object.__setattr__(self, f"_{name}s", Patterns(f"{name}_pattern", values))

    def rank(self, name: str) -> int:
        """Return the rank of a module."""
        return self._ranks.first(self.stored(name), self.r)

    def scale(self, name: str) -> float:
        """Return the factor of B @ A: alpha / r, or alpha / sqrt(r) under rsLoRA."""
        rank, alpha = self.rank(name), self._alphas.first(self.stored(name), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def stored(self, name: str) -> str:
        """Return a module's name as PEFT matches it with patterns."""
        return self.prefix + name.removeprefix("model.") if name.startswith("model.") else name


def read_rules(config: Mapping[str, Any]) -> PeftRules:
    """Check a configuration and return its rules.

    Raises ValueError, by name, for whatever plain LoRA factors cannot represent.
    """
    check_type(config)
    check_fields(config)
    _check_targets(config)
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    for name, value in (("r", config.get("r")), *_fields("rank_pattern", ranks)):
        _require(_is_whole_rank(value), name, value, RANKS)
    for name, value in (
        ("lora_alpha", config.get("lora_alpha")),
        *_fields("alpha_pattern", alphas),
    ):
        _require(is_alpha(value), name, value, ALPHAS)
    rslora = config.get("use_rslora")
    _require(rslora is None or isinstance(rslora, bool), "use_rslora", rslora, "true or false")
    return PeftRules(
        r=int(config["r"]),
        lora_alpha=config["lora_alpha"],
        rank_pattern={pattern: int(value) for pattern, value in ranks.items()},
        alpha_pattern=alphas,
        use_rslora=bool(rslora),
    )


def _fields(name: str, patterns: Mapping[str, float]) -> Iterable[tuple[str, object]]:
    return ((f"{name} {pattern!r}", value) for pattern, value in patterns.items())


def _is_whole_rank(value: object) -> bool:
    """Say whether a value is a rank, which some write as 8.0."""
    return is_rank(int(value) if isinstance(value, float) and value.is_integer() else value)


def _require(valid: bool, field: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"adapter_config {field} is {value!r}: must be {wanted}")


def _patterns(config: Mapping[str, Any], name: str) -> dict[str, float]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"adapter_config {name} is {patterns!r}: must be an object")
    return patterns


def _check_targets(config: Mapping[str, Any]) -> None:
    """Raise ValueError where the parameters that 3-D factors belong to are no list of names."""
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(each, str) for each in parameters):
        raise ValueError(
            f"adapter_config target_parameters is {parameters!r}: must be a list of names"
        )


def choose_patterns(
    wanted: Mapping[str, tuple[int, float]], default: tuple[int, float]
) -> tuple[dict[str, int], dict[str, float]]:
    """Return rank_pattern and alpha_pattern that give every module its (rank, alpha).

    No two patterns match one module, so their order, which PEFT sorts on saving, means nothing.
    """
    by_place: dict[str, set[tuple[int, float]]] = defaultdict(set)
    for name, value in wanted.items():
        by_place[_place(name)].add(value)
    grouped: dict[tuple[str, tuple[int, float]], list[str]] = defaultdict(list)
    keys: dict[str, tuple[int, float]] = {}
    for name, value in sorted(wanted.items()):
        if value == default:
            continue
        if len(by_place[_place(name)]) > 1:
            keys[re.escape(name)] = value
            continue
        parent, _, leaf = _place(name).rpartition(".")
        if leaf not in grouped[parent, value]:
            grouped[parent, value].append(leaf)
    for (parent, value), leaves in grouped.items():
        joined = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        keys[f"{parent}\\.{joined}" if parent else joined] = value
    return (
        {key: rank for key, (rank, _) in sorted(keys.items()) if rank != default[0]},
        {key: alpha for key, (_, alpha) in sorted(keys.items()) if alpha != default[1]},
    )


def most_common(values: Iterable[tuple[int, float]]) -> tuple[int, float]:
    """Return the most frequent value, the smallest of equals."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def target_modules(names: Iterable[str], num_with: Callable[[str], int]) -> list[str]:
    """Return PEFT target_modules that select these modules and no others.

    A leaf name such as `q_proj` where every layer of the base that has such a module is there, else
    the whole name. num_with: number of these layers, by the module's name there.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layers[_place(name)].append(name)
    targets: list[str] = []
    for place, members in layers.items():
        everywhere = len(members) == num_with(place) or not _LAYER.match(members[0])
        # `gate_proj` alone would also select the dense layers beside a shared expert.
        short = place if place.startswith("shared_expert") else place.rpartition(".")[2]
        targets += [short] if everywhere else members
    return list(dict.fromkeys(targets))


def split_expert(name: str) -> tuple[str, int, str] | None:
    """Split `model.layers.0.mlp.experts.3.up_proj` in (`...experts`, 3, `up_proj`)."""
    found = _EXPERT.fullmatch(name)
    return (found.group(1), int(found.group(2)), found.group(3)) if found else None


def layer_of(name: str) -> int | None:
    """Return the layer number in a Hugging Face module name, None outside of the layers."""
    found = _LAYER.match(name)
    return int(found.group(1)) if found else None


def _place(name: str) -> str:
    """Return the part of a name that all layers share: `self_attn.q_proj`, `lm_head`."""
    found = _LAYER.match(name)
    return ".".join(found.group(2).split(".")[-2:]) if found else name


def check_ranks(ranks: Mapping[str, int], rules: PeftRules) -> None:
    """Raise ValueError where a tensor's rank is not what its configuration says."""
    wrong = [f"{name} ({rank})" for name, rank in ranks.items() if rank != rules.rank(name)]
    if wrong:
        first = wrong[0].split(" ")[0]
        raise ValueError(
            f"adapter_config gives {first} the rank {rules.rank(first)}, its tensors have another: "
            f"{summarise(wrong)}: the configuration belongs to other tensors"
        )
