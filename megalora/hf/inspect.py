"""What an adapter is: targets, ranks, scales, sizes, norms, and what looks wrong."""

import itertools
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalora.adapters.grams import gram, norms
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.peft import CONFIG_NAME, read_adapter_directory
from megalora.hf.peft_config import layer_of, split_expert
from megalora.hf.whole_layers import said_of_whole
from megalora.model.decoder_names import LANGUAGE
from megalora.model.family import Names
from megalora.printable import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One module: Frobenius and spectral norms of A, of B, and of the update scale * B @ A."""

    name: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    norm_a: float
    norm_b: float
    norm_update: float
    spectral_a: float
    spectral_b: float
    spectral_update: float

    @property
    def num_parameters(self) -> int:
        """Elements of both factors."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(slots=True, kw_only=True)
class AdapterReport:
    """A whole adapter."""

    directory: str
    kind: str
    base_model: str
    modules: list[ModuleReport]
    warnings: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Elements of all factors."""
        return sum(module.num_parameters for module in self.modules)

    def said_of_b(self) -> str:
        """Say in how many modules B has grown above A, as "LoRA Without Regret" found it."""
        above = sum(module.spectral_b > module.spectral_a for module in self.modules)
        return f"B's spectral norm is above A's in {above} of {len(self.modules)} modules"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**asdict(self), "num_parameters": self.num_parameters}

    def table(self) -> str:
        """Return a table with one line for each kind of module, then the warnings."""
        head = ("module", "count", "rank", "scale", "parameters", *_NORMS)
        rows = [head, *(_row(kind, group) for kind, group in by_kind(self.modules).items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        title = f"{self.directory}: {self.kind}, base {self.base_model or 'not named'}"
        warned = (f"warning: {text}" for text in self.warnings)
        return "\n".join(map(printable, [title, *lines, *warned]))


def measure(name: str, module: LoRAFactors) -> ModuleReport:
    """Measure one module; the update is never formed."""
    return measure_all({name: module})[0]


def measure_all(factors: Mapping[str, LoRAFactors]) -> list[ModuleReport]:
    """Measure modules, all of one rank at once, in fp64 from products as small as the rank."""
    found: dict[str, ModuleReport] = {}
    by_rank = sorted(factors.items(), key=lambda named: named[1].rank)
    for rank, group in itertools.groupby(by_rank, key=lambda named: named[1].rank):
        for part in itertools.batched(group, max(1, _AT_ONCE // rank**2)):
            of_a = torch.stack([gram(module.lora_A.mT) for _, module in part])
            of_b = torch.stack([gram(module.lora_B) for _, module in part])
            measured = torch.stack(norms(of_a, of_b)).T.tolist()
            found |= {
                name: _report(name, module, *own)
                for (name, module), own in zip(part, measured, strict=True)
            }
    return [found[name] for name in factors]


def _report(
    name: str,
    module: LoRAFactors,
    a: float,
    b: float,
    product: float,
    spectral_a: float,
    spectral_b: float,
    spectral_product: float,
) -> ModuleReport:
    return ModuleReport(
        name=name,
        rank=module.rank,
        scale=module.scale,
        in_features=module.lora_A.shape[1],
        out_features=module.lora_B.shape[0],
        norm_a=a,
        norm_b=b,
        norm_update=abs(module.scale) * product,
        spectral_a=spectral_a,
        spectral_b=spectral_b,
        spectral_update=abs(module.scale) * spectral_product,
    )


# Elements of the products of modules that are measured at once: 32 MiB.
_AT_ONCE = 1 << 22
# As the table calls the norms of a group: of all its modules together, and the largest of them.
_NORMS = {
    "|A|": ("norm_a", False),
    "|B|": ("norm_b", False),
    "|update|": ("norm_update", False),
    "max |A|2": ("spectral_a", True),
    "max |B|2": ("spectral_b", True),
    "max |update|2": ("spectral_update", True),
}
# Of a base that is not known, which may be a part of a multimodal model.
_ANY = Names(language=LANGUAGE)


def inspect_peft(directory: str | Path) -> AdapterReport:
    """Describe a PEFT directory; what is wrong with its values becomes a warning."""
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_adapter_directory(directory, names=_ANY, on_problem=problems.append)
    if found.whole:
        problems.append(said_of_whole(found.whole))
    problems += [str(warning.message) for warning in caught]
    return describe(
        found.factors,
        directory=str(directory),
        kind="PEFT adapter",
        base_model=str(found.config.get("base_model_name_or_path") or ""),
        problems=problems,
    )


def describe(
    factors: Mapping[str, LoRAFactors],
    *,
    directory: str,
    kind: str,
    base_model: str = "",
    problems: list[str] | None = None,
) -> AdapterReport:
    """Measure factors and say what is suspicious about them."""
    modules = measure_all(factors)
    report = AdapterReport(
        directory=directory,
        kind=kind,
        base_model=base_model,
        modules=modules,
        warnings=list(problems or []),
    )
    zero = [module.name for module in modules if module.norm_b == 0]
    if zero:
        report.warnings.append(f"B is zero, so nothing was learned, in {summarise(zero)}")
    broken = [module.name for module in modules if not math.isfinite(module.norm_update)]
    if broken and not any("NaN" in text for text in report.warnings):
        report.warnings.append(f"values are NaN or infinite in {summarise(broken)}")
    return report


def is_peft(directory: str | Path) -> bool:
    """Say whether a directory is a PEFT adapter."""
    # Whatever bears the name: its reader says what is wrong with it.
    return os.path.lexists(Path(directory) / CONFIG_NAME)


def by_kind(modules: Iterable[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """Group modules by their names without the numbers of layers and of experts."""
    groups: dict[str, list[ModuleReport]] = defaultdict(list)
    for module in modules:
        expert = split_expert(module.name)
        name = f"{expert[0]}.*.{expert[2]}" if expert else module.name
        layer = layer_of(name)
        groups[name if layer is None else name.replace(f".{layer}.", ".*.", 1)].append(module)
    return groups


def _row(kind: str, group: list[ModuleReport]) -> tuple[str, ...]:
    def norm(name: str, *, largest: bool) -> str:
        values = torch.tensor([getattr(module, name) for module in group]).double()
        return f"{float(values.max() if largest else values.square().sum().sqrt()):.4g}"

    return (
        kind,
        str(len(group)),
        _values(module.rank for module in group),
        _values(module.scale for module in group),
        f"{sum(module.num_parameters for module in group):,}",
        *(norm(name, largest=largest) for name, largest in _NORMS.values()),
    )


def _values(values: Iterable[float]) -> str:
    distinct = sorted(set(values))
    text = [f"{value:g}" for value in distinct]
    return text[0] if len(text) == 1 else f"{text[0]}..{text[-1]}"
