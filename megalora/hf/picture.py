"""A picture of an adapter: how large its update and its factors are, by layer and kind of module.

matplotlib draws it, which no other command needs: it is imported when asked for.
"""

import importlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.hf.inspect import AdapterReport, ModuleReport, by_kind
from megalora.hf.peft_config import layer_of, split_expert
from megalora.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
# What is drawn, row by row; those of a row have one scale.
PANELS = (
    (
        ("norm_update", "Update  |c B A|,  Frobenius norm"),
        ("spectral_update", "Update  |c B A|,  spectral norm"),
    ),
    (("spectral_a", "A,  spectral norm"), ("spectral_b", "B,  spectral norm")),
)
# Okabe and Ito's colours, which the colour-blind tell apart, and a mark for each all the same.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#5B3A8E", "#4D4D4D")
_MARKS = "osD^vPX*"
# From where on numbers that differ so much are drawn on a logarithmic scale.
_MANY_TIMES = 30


@dataclass(frozen=True, slots=True)
class Line:
    """One kind of module: its label, and its modules by their place along the layers."""

    label: str
    places: dict[float, list[ModuleReport]]

    def values(self, name: str) -> tuple[list[float], list[float], list[float]]:
        """Return least, mean and largest at each place: they differ among experts."""
        each = [[getattr(module, name) for module in own] for own in self.places.values()]
        means = [sum(values) / len(values) for values in each]
        return [min(values) for values in each], means, [max(values) for values in each]


def check_picture(path: str) -> None:
    """Raise ValueError where no picture can be written to a path, before anything is read."""
    shown, file = f"plot {path!r}", Path(path)
    if file.suffix not in ENDINGS:
        raise ValueError(f"{shown} ends in none of {', '.join(ENDINGS)}: give one of these")
    if os.path.lexists(file):
        raise ValueError(f"{shown} exists already: give another name, or delete it")
    if not file.parent.is_dir():
        raise ValueError(f"{shown} is in no directory that exists: make {file.parent} first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"{shown} needs matplotlib, which is missing: install it by `pip install matplotlib`"
        )


def draw(report: AdapterReport, path: str) -> None:
    """Draw an adapter into a file that is not there yet, whole or not at all.

    Raises ValueError where the file cannot be written.
    """
    _save(figure_of(report), Path(path))


def figure_of(report: AdapterReport) -> "Figure":
    """Return matplotlib's figure of an adapter, with a panel for each of `PANELS`."""
    lines, outside = _lines(report.modules)
    figure: Any = importlib.import_module("matplotlib.figure").Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for row, panels in zip(axes, PANELS, strict=True):
        for one, (name, title) in zip(row, panels, strict=True):
            _panel(one, lines, name)
            one.set_title(title, loc="left", fontsize=11)
        _scale(
            row,
            [module for line in lines for own in line.places.values() for module in own],
            [name for name, _ in panels],
        )
    for one in axes.flat:
        _mark_places(one, lines, outside)
    for one in axes[-1]:
        one.set_xlabel("layer")
    _mark_mean_of_a(axes[1][1], report.modules)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle(_title(report), fontsize=12, x=0.01, ha="left")
    return figure


def _lines(modules: Sequence[ModuleReport]) -> tuple[list[Line], list[str]]:
    """Return a line for each kind of module, and the names of those that are in no layer.

    These stand to the right of the last layer, one after the other.
    """
    layers = [layer for module in modules if (layer := layer_of(module.name)) is not None]
    first_outside, lines, outside = max(layers, default=-1) + 1.5, [], []
    for kind, group in by_kind(modules).items():
        places: dict[float, list[ModuleReport]] = {}
        for module in group:
            layer = layer_of(module.name)
            place = first_outside + len(outside) if layer is None else layer
            places.setdefault(place, []).append(module)
        if layer_of(group[0].name) is None:
            outside.append(_label(kind))
        lines.append(Line(_label(kind), dict(sorted(places.items()))))
    return sorted(lines, key=lambda line: line.label in outside), outside


def _label(kind: str) -> str:
    """Return what is behind the layers in a kind, as `self_attn.q_proj`."""
    return printable(re.sub(r"^.*?layers\.\*\.", "", kind), 40)


def _panel(one: "Axes", lines: Sequence[Line], name: str) -> None:
    for number, line in enumerate(lines):
        least, means, most = line.values(name)
        places = list(line.places)
        colour, mark = (each[number % len(_COLOURS)] for each in (_COLOURS, _MARKS))
        dashes = ("-", "--", ":")[number // len(_COLOURS) % 3]
        options: dict[str, Any] = {"color": colour, "marker": mark, "linestyle": dashes}
        one.plot(places, means, **options, label=line.label, markersize=4, linewidth=1.4)
        if max(map(len, line.places.values())) > 1:
            one.fill_between(places, least, most, color=colour, alpha=0.15, linewidth=0)
    one.grid(visible=True, axis="y", color="#dddddd", linewidth=0.7)
    one.spines[["top", "right"]].set_visible(False)
    one.set_axisbelow(True)


def _scale(row: "Sequence[Axes]", modules: Sequence[ModuleReport], names: Sequence[str]) -> None:
    """Give the panels of a row one scale, so that they can be compared at sight."""
    every = [getattr(module, name) for module in modules for name in names]
    known = [value for value in every if math.isfinite(value) and value > 0]
    if known and max(known) > _MANY_TIMES * min(known):
        for one in row:
            one.set_yscale("log")
            one.set_ylim(min(known) / 1.5, max(known) * 1.5)
    else:
        for one in row:
            one.set_ylim(0, 1.08 * max(known, default=1.0))


def _mark_places(one: "Axes", lines: Sequence[Line], outside: Sequence[str]) -> None:
    layers = sorted({place for line in lines for place in line.places if place == int(place)})
    count = int(layers[-1]) + 1 if layers else 0
    step = max(1, math.ceil(count / 10))
    ticks = [float(place) for place in range(0, count, step)]
    places = [max(count, 0) + 0.5 + number for number in range(len(outside))]
    # Names are as wide as several numbers.
    ticks = [tick for tick in ticks if not places or tick < places[0] - 0.08 * (count + 1)]
    one.set_xticks([*ticks, *places], [*(f"{tick:g}" for tick in ticks), *outside])
    if places and count:
        one.axvline(count - 0.25, color="#999999", linewidth=0.8, linestyle=":")


def _mark_mean_of_a(one: "Axes", modules: Sequence[ModuleReport]) -> None:
    """Draw A's mean spectral norm among B's, so that it is seen where B is above."""
    known = [module.spectral_a for module in modules if math.isfinite(module.spectral_a)]
    if known:
        mean = sum(known) / len(known)
        one.axhline(mean, color="#444444", linewidth=1, linestyle=(0, (5, 4)), zorder=1)
        one.annotate(
            "mean of A",
            (0.005, mean),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=9,
            color="#444444",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _title(report: AdapterReport) -> str:
    def values(name: str) -> str:
        found = sorted({getattr(module, name) for module in report.modules})
        return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

    base = f" of {printable(report.base_model, 50)}" if report.base_model else ""
    first = f"{printable(Path(report.directory).name, 60)}: {report.kind}{base}"
    sizes = (
        f"rank {values('rank')}, scale c {values('scale')}, {report.num_parameters:,} parameters"
    )
    experts = any(split_expert(module.name) for module in report.modules)
    bands = " Bands: least to largest of a layer's experts." if experts else ""
    return f"{first}\n{sizes}. {report.said_of_b()}.{bands}"


def _save(figure: "Figure", file: Path) -> None:
    beside = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        figure.savefig(beside, dpi=150)
        beside.replace(file)
    except OSError as error:
        raise ValueError(
            f"plot {str(file)!r} cannot be written: {error.strerror}: give another place"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
