"""What an adapter directory says and holds, without its values: all that servers decide by."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalora.config import ALPHAS, RANKS, is_alpha, is_rank
from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.files import ADAPTER, TensorFiles, read_json
from megalora.hf.peft import CONFIG_NAME
from megalora.hf.peft_config import most_common, split_expert
from megalora.hf.stacked_experts import (
    from_tinker_projection,
    to_tinker_name,
    to_tinker_projection,
)
from megalora.model.family import DEFAULT_NAMES, Names

# How the experts of a layer lie: `experts.3.up_proj`; `experts` and `experts.base_layer`, 2-D; or
# `experts.w1`, 3-D.
Layout = Literal["single", "in one", "stacked"]

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_SINGLE = re.compile(r".+\.experts\.(\d+)\.(\w+)")
_IN_ONE = re.compile(r".+\.experts(\.base_layer)?")
_STACKED = re.compile(r".+\.experts\.(w[123]|gate_proj|up_proj|down_proj|gate_up_proj)")
_BASE_COPY = re.compile(r".*\.(lm_head|embed_tokens)\.base_layer\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """An adapter as servers look at it.

    config: of adapter_config.json, what is not there being unused. ranks: of each module's factors
    by its name without `base_model.model.`, 0 where the experts of a layer are in one tensor, whose
    rank only the configuration says. others: tensors that are no factors.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    others: list[str] = field(default_factory=list)

    @property
    def layouts(self) -> set[Layout]:
        """Return how its experts lie; empty where it has none."""
        return {layout for name in self.ranks if (layout := layout_of(name))}

    @property
    def largest_rank(self) -> int:
        """Return the largest rank that its configuration or a tensor has."""
        said = [self.config.get("r"), *patterns(self.config, "rank_pattern").values()]
        return max([*self.ranks.values(), *(rank for rank in said if isinstance(rank, int))])

    @property
    def rank_outside_patterns(self) -> int:
        """Return `r`, 0 where there is none."""
        rank = self.config.get("r")
        return rank if isinstance(rank, int) else 0

    def experts(self) -> Iterator[tuple[str, int, str, int]]:
        """Yield (`...experts`, number, projection, rank) of single experts."""
        for name, rank in self.ranks.items():
            if layout_of(name) == "single":
                prefix, number, projection = name.rsplit(".", 2)
                yield prefix, int(number), projection, rank

    def leaves(self) -> set[str]:
        """Return the last parts of the names outside of the experts."""
        return {name.rpartition(".")[2] for name in self.ranks if not layout_of(name)}


def layout_of(module: str) -> Layout | None:
    """Say how a module's experts lie; None where it is none of experts."""
    if _SINGLE.fullmatch(module):
        return "single"
    if _STACKED.fullmatch(module):
        return "stacked"
    return "in one" if _IN_ONE.fullmatch(module) else None


def patterns(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return rank_pattern or alpha_pattern; empty where there is none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def outline_of_directory(directory: str | Path) -> Outline:
    """Read the outline of a PEFT directory, of whomever; ValueError where its files are broken."""
    path = Path(directory)
    config = read_json(path / CONFIG_NAME)
    _check_numbers(config)
    files = TensorFiles(path, ADAPTER, framework="np")
    ranks: dict[str, int] = {}
    others: list[str] = []
    for key in files:
        found = _KEY.fullmatch(key)
        if not found:
            others += [] if _BASE_COPY.fullmatch(key) else [key]
        elif found.group(3) == "A":
            module, shape = found.group(1), files.shape(key)
            has_rank = len(shape) > 1 and layout_of(module) != "in one"
            ranks[module] = list(shape)[-2] if has_rank else 0
    if not ranks:
        raise ValueError(f"{directory} has no LoRA factors")
    return Outline(config=config, ranks=ranks, others=others)


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a rank or an alpha is there and is none."""
    for kind, limits, is_one in (("r", RANKS, is_rank), ("lora_alpha", ALPHAS, is_alpha)):
        name = "rank_pattern" if kind == "r" else "alpha_pattern"
        given = {f"{name} {pattern!r:.100}": v for pattern, v in patterns(config, name).items()}
        for field_name, value in {kind: config.get(kind, 1), **given}.items():
            whole = int(value) if isinstance(value, float) and value.is_integer() else value
            if not is_one(whole):
                raise ValueError(f"adapter_config {field_name} is {value!r:.100}: must be {limits}")


def outline_of_export(
    factors: Mapping[str, LoRAFactors], format: str, names: Names = DEFAULT_NAMES
) -> Outline:
    """Return the outline of what `megalora.hf.peft.write_adapter` would write, values apart."""
    pairs = {names.as_adapted(name): (m.rank, m.scale) for name, m in factors.items()}
    if format in ("uniform", "tinker"):
        largest = max(rank for rank, _ in pairs.values())
        pairs = dict.fromkeys(pairs, (largest, 1.0))
    of_experts = {name: pair for name, pair in pairs.items() if split_expert(name)}
    rank, scale = most_common((of_experts or pairs).values())
    others = [pair for name, pair in pairs.items() if pair[0] != rank]
    alphas = [pair for pair in pairs.values() if not same_scale(pair[0] * pair[1], rank * scale)]
    ranks: dict[str, int] = {}
    for name, (its_rank, _) in pairs.items():
        ranks |= _written(name, its_rank, format)
    alpha = rank * scale
    ranks_said = {"others": max(rank for rank, _ in others)} if others else {}
    alphas_said = {"others": alphas[0][0] * alphas[0][1]} if alphas else {}
    targeted = pairs.keys()
    # What a base with experts needs; one without does not mind.
    parameters = [f"{name}.weight" for name in pairs if not split_expert(name)]
    if format in ("peft", "peft-3d"):
        parameters += ["experts.gate_up_proj", "experts.down_proj"]
    if format == "peft-3d" and of_experts:
        ranks_said["experts.gate_up_proj"] = 2 * rank
        alphas_said["experts.gate_up_proj"] = 2 * alpha
        targeted -= of_experts.keys()
    targets = {name.rpartition(".")[2] for name in targeted}
    if format == "uniform":
        targets = {from_tinker_projection(name) for name in targets}
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks_said,
        "alpha_pattern": alphas_said,
        "target_modules": "all-linear" if format == "tinker" else sorted(targets),
        "target_parameters": parameters,
    }
    return Outline(config=config, ranks=ranks)


def _written(name: str, rank: int, format: str) -> dict[str, int]:
    """Return the modules that a format makes of one, with their ranks."""
    expert = split_expert(name)
    if format == "peft-3d" and expert:
        prefix, _, projection = expert
        is_down = to_tinker_projection(projection) == "w2"
        return {prefix if is_down else f"{prefix}.base_layer": 0}
    if format == "tinker" and expert:
        return {f"{expert[0]}.{to_tinker_projection(expert[2])}": rank}
    return {to_tinker_name(name) if format == "tinker" else name: rank}
