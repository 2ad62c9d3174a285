"""Write figures as data, as plots and as the page of verdicts."""

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import megalora
from benchmarks.regret.experiments import Figure

HEAD = """\
# "LoRA Without Regret", run here

The experiments of Schulman and Thinking Machines Lab (2025), through megalora and Megatron, at two
scales: `make figures` runs them on a toy, `make figures MODEL=smollm2` on a pretrained model. What
is said to be reproduced is so for the model, the data and the lengths named here; it is no evidence
for the article's models.

"""
TOY = """\
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
"""
TABLE = """\
| Figure | The article found | This run shows | Verdict | Scale |
|---|---|---|---|---|
"""
ABOUT = "about.json"
# The same color in every figure; what else there is follows.
METHODS = ("full fine-tuning", "rank 1", "rank 4", "rank 16", "rank 64", "rank 8")
LINE_STYLES = ("-", "--", ":")
# Curves of fewer points have their points marked.
MARKED = 10
PACKAGES = ("torch", "megatron-core")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a scale is called on the page, and what its runs are."""

    title: str
    text: str


def dated(text: str) -> str:
    """Put the day and the versions of this run into a scale's text."""
    others = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    versions = f"megalora {megalora.__version__}, {others}"
    return text.format(date=datetime.date.today().isoformat(), versions=versions)


def tell(figure: Figure) -> None:
    """Print what a figure finds."""
    for found in figure.findings:
        print(f"{figure.name}, {found.verdict}: the article: {found.article};")
        print(f"    here: {found.here}", flush=True)


def save(figures: Sequence[Figure], folder: Path, about: About) -> None:
    """Write each figure's JSON and PNG into the folder of a scale; other figures there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        data = asdict(figure) | {"verdicts": [finding.verdict for finding in figure.findings]}
        _write(folder / f"{figure.name}.json", json.dumps(_rounded(data)) + "\n")
        _plot(figure, folder / f"{figure.name}.png")
    _write(folder / ABOUT, json.dumps(asdict(about), indent=1) + "\n")


def write_page(folder: Path, page: Path) -> None:
    """Write the page of all scales from what `save` left: the toy in `folder`, others below it."""
    scales = {
        about.parent: (About(**json.loads(about.read_text())), _figures(about.parent))
        for about in [folder / ABOUT, *sorted(folder.glob(f"*/{ABOUT}"))]
        if about.exists()
    }
    parts = [HEAD, _side_by_side(list(scales.values()))]
    for where, (about, figures) in scales.items():
        near = where.relative_to(page.parent) if where.is_relative_to(page.parent) else where
        parts.append(_section(about, figures, near))
    _write(page, "".join(parts))


def _figures(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of a folder, the article's by their number and others behind them."""
    found = [json.loads(p.read_text()) for p in folder.glob("*.json") if p.name != ABOUT]
    return sorted(found, key=lambda f: (not f["name"].startswith("figure-"), f["name"]))


def _side_by_side(scales: Sequence[tuple[About, list[dict[str, Any]]]]) -> str:
    """Return a table with a line for each claim and its verdicts at each scale."""
    verdicts: dict[tuple[str, str], list[dict[str, None]]] = {}
    for number, (_, figures) in enumerate(scales):
        for figure in figures:
            for finding, verdict in zip(figure["findings"], figure["verdicts"], strict=True):
                # How a scale judges it stands behind it.
                claim = (_number(figure), finding["article"].partition(" (")[0])
                verdicts.setdefault(claim, [{} for _ in scales])[number][f"**{verdict}**"] = None
    head = ["Figure", "The article found", *(about.title for about, _ in scales)]
    ordered = sorted(verdicts.items(), key=lambda item: (len(item[0][0]), item[0][0]))
    rows = [head, ["---"] * len(head)]
    rows += [
        [*claim, *(" and ".join(each) or "not run" for each in found)] for claim, found in ordered
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _section(about: About, figures: Sequence[dict[str, Any]], where: Path) -> str:
    rows = [
        f"| {_number(figure)} | {found['article']} | {found['here']} | **{verdict}** | "
        f"{figure['scale']} |\n"
        for figure in figures
        for found, verdict in zip(figure["findings"], figure["verdicts"], strict=True)
    ]
    plots = [
        f"\n### {_heading(f)}\n\n![{f['title']}]({where}/{f['name']}.png)\n"
        f"\nThin lines are seeds, thick ones their mean. [Data]({where}/{f['name']}.json).\n"
        f"{_paragraph(f.get('text', ''))}"
        for f in figures
    ]
    return f"\n## {about.title}\n\n{about.text}\n{TABLE}{''.join(rows)}{''.join(plots)}"


def _paragraph(text: str) -> str:
    return text and f"\n{text}"


def _number(figure: dict[str, Any]) -> str:
    return figure["name"].removeprefix("figure-")


def _heading(figure: dict[str, Any]) -> str:
    is_of_article = figure["name"].startswith("figure-")
    return f"Figure {_number(figure)}: {figure['title']}" if is_of_article else figure["title"]


def _rounded(value: Any) -> Any:
    """Keep five digits of every float, more than seeds agree on; JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
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
    points = sorted({x for curve in figure.curves for x in curve.x})
    if figure.log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(points) < MARKED:
        axes.set_xticks(points, [f"{x:g}" for x in points])
        axes.minorticks_off()
    if figure.y_limits:
        axes.set_ylim(*figure.y_limits)
    axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    beside = path.with_suffix(".tmp.png")
    plot.savefig(beside, dpi=110)
    beside.replace(path)
    plt.close(plot)
