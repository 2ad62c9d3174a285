"""Write csrc/cuda/choices.h: by which route each product was measured to be the fastest.

python benchmarks/choose.py [--results benchmarks/results] [--output csrc/cuda/choices.h]

In a row of bench_linear.py or bench_mlp.py whose variant is "megalora, PRODUCT:ROUTE" the library
chooses all but that product's route by itself, so that rows of one shape and one run that name the
same product differ in its route alone. A run decides what it measured by two routes or more, and a
later run decides anew. Run it after adding results; a new name of a route is one of `Route` in
csrc/cuda/route.h.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _results import RESULTS, Row, read, runs_of, write_text

HEADER = Path(__file__).parents[1] / "csrc/cuda/choices.h"
# In which pass a product is what its bench case says: one's rank and projections are the case's.
PHASES = {"project": "forward", "update": "forward", "outer": "backward", "backward": "backward"}
# Another route has to be faster by more than the noise, a hundredth of the frozen linear's time.
DEFAULT, MARGIN = "gemm", 0.01


@dataclass(frozen=True)
class Choice:
    """A row of the table: what was chosen, and by which overheads, from which runs."""

    device: str
    capability: int
    product: str
    several: bool
    rank_class: int
    overheads: dict[str, float]
    runs: tuple[str, ...]

    @property
    def route(self) -> str:
        """Return the fastest route; the default where none is faster by more than the noise."""
        best = min(self.overheads, key=lambda route: self.overheads[route])
        default = self.overheads.get(DEFAULT, float("inf"))
        return DEFAULT if default - self.overheads[best] <= MARGIN else best


@dataclass(frozen=True)
class Shape:
    """The overheads of one product at one shape by route, and the run that measured them."""

    run: str
    overheads: dict[str, float]


def rank_class(rank: int) -> int:
    """Return the class of a rank, as csrc/cuda/route.h has it."""
    return 1 if rank < 16 and rank % 8 else rank


def choices(results: Path) -> list[Choice]:
    """Return the rows of all devices, in the order that the library searches them."""
    folders = [folder for folder in sorted(results.iterdir()) if runs_of(folder)]
    return [choice for folder in folders for choice in _choices_of(folder)]


def header(rows: list[Choice]) -> str:
    """Return the text of csrc/cuda/choices.h."""
    lines = [_line(row) for row in rows]
    return "\n".join(
        [
            "// Written by benchmarks/choose.py from benchmarks/results: run it, do not edit.",
            "#pragma once",
            "",
            "#include <array>",
            "",
            '#include "route.h"',
            "",
            "namespace megalora::cuda {",
            "",
            "// Behind each row: the overheads over the frozen linear that decided, and their run.",
            "// clang-format off",
            f"constexpr std::array<Choice, {len(rows)}> kChoices{{{{",
            *lines,
            "}};",
            "// clang-format on",
            "",
            "}  // namespace megalora::cuda",
            "",
        ]
    )


def _choices_of(folder: Path) -> Iterator[Choice]:
    classes: dict[tuple[str, bool, int], list[Shape]] = defaultdict(list)
    for (product, several, rank, *_), shape in _shapes_of(folder).items():
        classes[product, several, rank_class(rank)].append(shape)
    facts = _facts(folder)
    for (product, several, size), shapes in sorted(classes.items()):
        everywhere = set.intersection(*(set(shape.overheads) for shape in shapes))
        means = {
            route: statistics.mean(shape.overheads[route] for shape in shapes)
            for route in sorted(everywhere)
        }
        if len(means) > 1:
            runs = tuple(sorted({shape.run for shape in shapes}))
            device, capability = facts["device"], facts["capability"]
            yield Choice(device, capability, product, several, size, means, runs)


def _shapes_of(folder: Path) -> dict[tuple, Shape]:
    """Return what the last run that measured it says of each product at each shape."""
    found: dict[tuple, Shape] = {}
    for run in runs_of(folder):
        rows = read(run / "results.jsonl")
        automatic = next((row["automatic"] for row in rows if "automatic" in row), "")
        own: dict[tuple, dict[str, float]] = defaultdict(dict)
        for row in filter(_is_plain, rows):
            for product, route in _named(row["variant"], automatic):
                several = row["segments"] != "-"
                shape = (product, several, row["rank"], row["in"], row["out"], row["tokens"])
                phase = PHASES.get(product, "both")
                own[shape][route] = row[f"{phase}_overhead"]
        for shape, overheads in own.items():
            if len(overheads) > 1:
                found[shape] = Shape(run.name, overheads)
    return found


def _is_plain(row: Row) -> bool:
    """Say whether a row times a linear or an MLP without dropout that all routes can compute."""
    is_case = str(row.get("bench", "")).startswith(("linear ", "mlp")) and "variant" in row
    return is_case and row["form"] == "plain" and row["p"] == 0


def _named(variant: str, automatic: str) -> list[tuple[str, str]]:
    """Return the products and routes that a variant of ours names; its own choice where known."""
    name, _, routes = variant.partition(", ")
    if name != "megalora":
        return []
    entries = (routes or automatic).split(",")
    return [
        (product, route) for product, colon, route in (e.partition(":") for e in entries) if colon
    ]


def _facts(folder: Path) -> Row:
    """Return the device's name and compute capability, as its runs have them."""
    found: Row = {}
    for run in runs_of(folder):
        for row in read(run / "results.jsonl"):
            facts = row.get("setting", row)
            found |= {key: facts[key] for key in ("device", "capability") if key in facts}
    return found


def _line(row: Choice) -> str:
    fields = f'"{row.device}", {row.capability}, "{row.product}", {str(row.several).lower()}'
    measured = ", ".join(f"{route} {100 * value:.1f} %" for route, value in row.overheads.items())
    entry = f"    {{{fields}, {row.rank_class}, Route::{row.route}}},"
    return f"{entry}  // {measured}: {', '.join(row.runs)}"


def main() -> None:
    """Write the header."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=HEADER)
    options = parser.parse_args()
    write_text(options.output, header(choices(options.results)))


if __name__ == "__main__":
    main()
