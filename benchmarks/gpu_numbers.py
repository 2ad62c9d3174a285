"""Write what was measured on GPUs into docs/performance.md, and the least of it into README.

python benchmarks/gpu_numbers.py

Both have two comments between which it stands. Every line has the last numbers of its shape in
benchmarks/results/<device>/, all of them from one run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from _pages import ROOT, rewritten
from _results import RESULTS, Row, line, read, runs_of, write_text

COMMAND = "benchmarks/gpu_numbers.py"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
LINEARS = {
    "floor": "floor",
    "megalora": "megalora",
    "addmm": "addmm, beta 1",
    "as Unsloth": "Unsloth's way",
    "PEFT layer": "PEFT's layer",
    "torch.compile": "torch.compile",
    "eager": "eager",
}
EXPERTS = {"floor": "floor", "megalora": "megalora", "grouped_mm": "torch's grouped GEMM"}
SHAPES = {"fc1": "fc1 2048 -> 1536, gate and up", "fc2": "fc2 768 -> 2048"}
MODELS = {
    "dense": "Llama-3.1-8B",
    "moe": "16 experts, top 4",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
OVER = "forward / backward over frozen"
# Of the ranks that experts were measured at: 32 of an adapter, of 8 active experts.
SUMMARY_EXPERT_RANK = 4
# The rows of one shape by variant, or of one model by name.
Group = dict[str, Row]


def section(results: Path) -> str:
    """Return the text between the comments: a part for every device that has runs."""
    folders = [folder for folder in sorted(results.iterdir()) if runs_of(folder)]
    return "\n\n".join("\n".join(_device(folder)) for folder in folders)


def summary(results: Path) -> str:
    """Return the text between README's comments: a table for every device that has runs."""
    folders = [folder for folder in sorted(results.iterdir()) if runs_of(folder)]
    return "\n\n".join("\n".join(_summary(folder)) for folder in folders)


def _device(folder: Path) -> list[str]:
    runs = runs_of(folder)
    setting = next(row["setting"] for row in read(runs[-1] / "results.jsonl") if "setting" in row)
    linears = _newest(runs, "linear goal", "variant", ("in", "out", "tokens", "rank"))
    experts = _newest(runs, "experts", "variant", ("shape", "rank", "rows"))
    models = _newest(runs, "model", "name", ("kind", "layers", "rank", "tokens"))
    lines = [f"### {setting['device']}, bf16, {setting['date']}"]
    if linears:
        first = linears[0]["frozen"]
        lines += ["", f"One linear {first['in']} -> {first['out']}, {first['tokens']} tokens, over"]
        lines[-1] += " the frozen linear, forward / backward:"
        lines += ["", *_overheads("rank", linears, LINEARS, lambda row: str(row["rank"]))]
    if experts:
        rows = experts[0]["frozen"]["rows"]
        lines += ["", f"128 experts of Qwen3-30B-A3B, {rows:,} rows, skewed routing, over the"]
        lines[-1] += " frozen experts:"
        lines += ["", *_overheads("", experts, EXPERTS, _expert_shape)]
    if models:
        days = " and ".join(sorted({group["LoRA"]["day"] for group in models}))
        lines += ["", f"Layers of whole models, {days}; a step has Megatron's fp32 gradients,"]
        lines[-1] += " clipping and Adam:"
        lines += ["", *_models(models)]
    where = f"benchmarks/results/{folder.name}"
    return [*lines, "", f"The runs, and what they say: [{where}](../{where})."]


def _summary(folder: Path) -> list[str]:
    """Return one table: the first linear, each product of experts at one rank, all whole steps."""
    runs = runs_of(folder)
    setting = next(row["setting"] for row in read(runs[-1] / "results.jsonl") if "setting" in row)
    lines = [line([f"{setting['device']}, bf16, {setting['date']}", "megalora", "others"])]
    lines.append(line(["---"] * 3))
    for group in _newest(runs, "linear goal", "variant", ("in", "out", "tokens", "rank"))[:1]:
        row = group["frozen"]
        what = f"one linear {row['in']} -> {row['out']}, {row['tokens']:,} tokens, rank"
        lines.append(line([f"{what} {row['rank']}: {OVER}", *_beside(group, LINEARS)]))
    for group in _newest(runs, "experts", "variant", ("shape", "rank", "rows")):
        if group["frozen"]["rank"] == SUMMARY_EXPERT_RANK:
            what = f"128 experts, {_expert_shape(group['frozen'])}: {OVER}"
            lines.append(line([what, *_beside(group, EXPERTS)]))
    for group in _newest(runs, "model", "name", ("kind", "layers", "rank", "tokens")):
        lines += _step(group)
    return lines


def _beside(group: Group, variants: dict[str, str]) -> list[str]:
    """Return the cells of megalora and of all others that computed the same."""
    others = [
        f"{title} {_overhead(group[name])}"
        for name, title in variants.items()
        if name in group and name not in ("floor", "megalora")
    ]
    return [_overhead(group["megalora"]), ", ".join(others)]


def _step(group: Group) -> list[str]:
    """Return the line of a model's whole steps, none where these were not measured."""
    lora = group["LoRA"]
    if "step_ms" not in lora:
        return []
    cells = [f"{_model_name(lora)}, {lora['tokens']:,} tokens: a whole step"]
    cells.append(f"**{lora['step_ms']:.0f} ms**, {lora['tokens_per_second']:,.0f} tokens/s")
    full = group.get("full", {})
    cells.append(f"full fine-tuning {full['step_ms']:.0f} ms" if "step_ms" in full else "")
    return [line(cells)]


def _newest(runs: Sequence[Path], bench: str, name: str, shape: Sequence[str]) -> list[Group]:
    """Return for each shape the rows of the last run that has it, with its day."""
    found: dict[tuple, Group] = {}
    for run in runs:
        own: dict[tuple, Group] = {}
        for row in map(_with_phases, read(run / "results.jsonl")):
            if row.get("bench") == bench and name in row:
                group = own.setdefault(tuple(row[key] for key in shape), {})
                group[row[name]] = row | {"day": run.name[:10]}
        found |= own
    return [found[key] for key in sorted(found)]


def _with_phases(row: Row) -> Row:
    """Return a row of a model as it is written now: runs up to 2026-11-26-3 had no whole steps."""
    if row.get("bench") != "model" or "milliseconds" not in row:
        return row
    tokens = round(row["tokens_per_second"] * row["milliseconds"] / 1e3)
    return row | {"forward_backward_ms": row["milliseconds"], "tokens": tokens}


def _overheads(
    head: str, groups: Sequence[Group], variants: dict[str, str], label: Callable[[Row], str]
) -> list[str]:
    measured = {name for group in groups for name in group}
    names = [name for name in variants if name in measured]
    lines = [line([head, *(variants[name] for name in names)]), line(["---"] * (1 + len(names)))]
    for group in groups:
        cells = [_overhead(group[name]) if name in group else "" for name in names]
        lines.append(line([label(group["frozen"]), *cells]))
    return lines


def _overhead(row: Row) -> str:
    cell = f"{100 * row['forward_overhead']:.0f} / {100 * row['backward_overhead']:.0f} %"
    return f"**{cell}**" if row["variant"] == "megalora" else cell


def _expert_shape(row: Row) -> str:
    return f"{SHAPES[row['shape']]}, rank {row['rank']}"


def _models(groups: Sequence[Group]) -> list[str]:
    head = ["", "tokens", "forward and backward: frozen, LoRA, full", "LoRA over frozen, full"]
    head += ["whole step: LoRA, full", "LoRA over full", "tokens/s"]
    return [line(head), line(["---"] * len(head)), *(line(_model(group)) for group in groups)]


def _model(group: Group) -> list[str]:
    lora, full = group["LoRA"], group.get("full", {})
    passes = [
        group[name]["forward_backward_ms"] for name in ("frozen", "LoRA", "full") if name in group
    ]
    ratios = [f"{lora[key]:.2f}" for key in ("over_frozen", "over_full") if key in lora]
    steps = [row["step_ms"] for row in (lora, full) if "step_ms" in row]
    return [
        _model_name(lora),
        f"{lora['tokens']:,}",
        _milliseconds(passes),
        " / ".join(ratios),
        _milliseconds(steps) if steps else "not measured yet",
        f"**{lora['step_over_full']:.2f}**" if "step_over_full" in lora else "",
        f"{lora['tokens_per_second']:,.0f}" if steps else "",
    ]


def _model_name(row: Row) -> str:
    return f"{MODELS[row['kind']]}, {row['layers']} layers, rank {row['rank']}"


def _milliseconds(values: Sequence[float]) -> str:
    return f"{' / '.join(f'{value:.0f}' for value in values)} ms"


if __name__ == "__main__":
    for page, text in ((PAGE, section(RESULTS)), (README, summary(RESULTS))):
        write_text(page, rewritten(page.read_text(), COMMAND, text))
