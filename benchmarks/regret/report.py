"""Write figures as data, as plots and as the page of verdicts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from benchmarks.regret.experiments import Figure

INTRODUCTION = """\
# "LoRA Without Regret" at toy size

`make figures` writes this page. The experiments of Schulman and Thinking Machines Lab (2025) are
run through megalora and Megatron, on a model of 2 layers and width 64 that has learned a random
table of 4,096 facts and must learn another in which half of them are changed. Every run has the
same constant rate from start to end, Adam (0.9, 0.95), and no weight decay; each method has the
best rate of a grid. Thin lines are seeds, thick ones their mean. What is said to be reproduced
is so for this toy; it is no evidence for the article's models.

| Figure | The article | Here | Verdict |
|---|---|---|---|
"""


def write(figures: Sequence[Figure], folder: Path, page: Path) -> None:
    """Write each figure's JSON and PNG into a folder, and the page that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        data = asdict(figure) | {"verdicts": [finding.verdict for finding in figure.findings]}
        _write(folder / f"{figure.name}.json", json.dumps(data, indent=1))
        _plot(figure, folder / f"{figure.name}.png")
    where = folder.relative_to(page.parent) if folder.is_relative_to(page.parent) else folder
    rows = [
        f"| {figure.name} | {found.article} | {found.here} | **{found.verdict}** |"
        for figure in figures
        for found in figure.findings
    ]
    plots = [f"\n## {f.title}\n\n![{f.title}]({where}/{f.name}.png)\n" for f in figures]
    _write(page, INTRODUCTION + "\n".join(rows) + "\n" + "".join(plots))


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text)
    beside.replace(path)


def _plot(figure: Figure, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, curve in enumerate(figure.curves):
        color = f"C{number}"
        for seed in curve.seeds:
            axes.plot(curve.x, seed, color=color, alpha=0.3, linewidth=0.8)
        middle = [mean(values) for values in zip(*curve.seeds, strict=True)]
        axes.plot(curve.x, middle, color=color, label=curve.label)
    if figure.log_x:
        axes.set_xscale("log")
    axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    axes.legend()
    beside = path.with_suffix(".tmp.png")
    plot.savefig(beside, dpi=110)
    beside.replace(path)
    plt.close(plot)
