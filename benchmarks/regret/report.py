"""Write figures as data, as plots and as the page of verdicts."""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import megalora
from benchmarks.regret.experiments import Figure

INTRODUCTION = """\
# "LoRA Without Regret" at toy size

`make figures` ran this on {date} with {versions}.

The experiments of Schulman and Thinking Machines Lab (2025), through megalora and Megatron, on a
model of 2 layers and width 64. It has learned a random table of 4,096 facts, each of 6 bits, and is
fine-tuned to another table in which half of them are changed, so that it must store what it
learns. Every run has the same constant rate from start to end, Adam (0.9, 0.95) and no weight
decay; full fine-tuning leaves out the embedding, which no adapter touches. In the sweep, each
method has the same grid of rates; elsewhere it has the best rate of the sweep or of its neighbours.
For reinforcement learning the base has learned two tables at once, and is rewarded where its answer
of two tokens follows the second; the loss is that of `megalora.losses`. Either each language
has its own half of the vocabulary (`halves`), or nothing but the facts tells them apart (`facts`).

What is said to be reproduced is so for this toy; it is no evidence for the article's models.

| Figure | The article found | This run shows | Verdict | Scale |
|---|---|---|---|---|
"""
# The same color in every figure; what else there is follows.
METHODS = ("full fine-tuning", "rank 1", "rank 4", "rank 16", "rank 64", "rank 8")
LINE_STYLES = ("-", "--", ":")
# Curves of fewer points have their points marked.
MARKED = 10
PACKAGES = ("torch", "megatron-core")


def write(figures: Sequence[Figure], folder: Path, page: Path) -> None:
    """Write each figure's JSON and PNG into a folder, and the page that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        data = asdict(figure) | {"verdicts": [finding.verdict for finding in figure.findings]}
        _write(folder / f"{figure.name}.json", json.dumps(_rounded(data)) + "\n")
        _plot(figure, folder / f"{figure.name}.png")
    where = folder.relative_to(page.parent) if folder.is_relative_to(page.parent) else folder
    rows = [
        f"| {_number(figure)} | {found.article} | {found.here} | **{found.verdict}** | "
        f"{figure.scale} |"
        for figure in figures
        for found in figure.findings
    ]
    plots = [
        f"\n## Figure {_number(f)}: {f.title}\n\n![{f.title}]({where}/{f.name}.png)\n"
        f"\nThin lines are seeds, thick ones their mean. [Data]({where}/{f.name}.json).\n"
        for f in figures
    ]
    others = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    versions = f"megalora {megalora.__version__}, {others}"
    head = INTRODUCTION.format(date=datetime.date.today().isoformat(), versions=versions)
    _write(page, head + "\n".join(rows) + "\n" + "".join(plots))


def _number(figure: Figure) -> str:
    return figure.name.removeprefix("figure-")


def _rounded(value: Any) -> Any:
    """Keep five digits of every float, which is more than seeds agree on."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def _plot(figure: Figure, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plot, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colors = {name: f"C{number}" for number, name in enumerate(METHODS)}
    styles: dict[str, str] = {}
    for curve in figure.curves:
        # What a label says behind a comma is told by the style of the line.
        name, _, setting = curve.label.partition(", ")
        look: dict[str, Any] = {
            "color": colors.setdefault(name, f"C{len(colors)}"),
            "linestyle": styles.setdefault(setting, LINE_STYLES[len(styles)]),
            "marker": "o" if len(curve.x) < MARKED else "",
        }
        for seed in curve.seeds:
            axes.plot(curve.x, seed, **look, alpha=0.3, linewidth=0.8, markersize=3)
        middle = [mean(values) for values in zip(*curve.seeds, strict=True)]
        axes.plot(curve.x, middle, **look, label=curve.label, markersize=4)
    points = figure.curves[0].x
    if figure.log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(points) < MARKED:
        axes.set_xticks(points, [f"{x:g}" for x in points])
        axes.minorticks_off()
    axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    beside = path.with_suffix(".tmp.png")
    plot.savefig(beside, dpi=110)
    beside.replace(path)
    plt.close(plot)
