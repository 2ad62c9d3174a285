"""The tables of gpu_check.py, made from its JSON lines."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from _results import Row, line, overhead_table, plain_table, read, write_text
from gpu_kit import Kit

PACKAGES = ("megatron-core", "transformer-engine", "triton", "peft", "transformers")
QWEN3_LAYERS = 48


def setting(kit: Kit | None) -> Row:
    """Return the date, the device, the versions, and what the kit brings."""
    on_gpu = torch.cuda.is_available()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    brought = (
        {wheel.name.split("-")[0]: wheel.name.split("-")[1] for wheel in kit.wheels} if kit else {}
    )
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = brought.get(package.replace("-", "_"), "absent")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, a rehearsal",
        **({"capability": _capability()} if on_gpu else {}),
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        **versions,
        "library": f"of the kit, commit {kit.facts['commit']}"
        if kit and kit.fits_this_torch()
        else "of the checkout",
    }


def write_report(directory: Path) -> None:
    """Write report.md from results.jsonl."""
    write_text(directory / "report.md", report(read(directory / "results.jsonl")))


def report(rows: list[Row]) -> str:
    """Return all results as one Markdown document."""
    found = next((row["setting"] for row in rows if "setting" in row), {})
    lines = [f"# {found.get('device', 'unknown device')}, {found.get('date', '')}", ""]
    lines += [f"* {name}: {value}" for name, value in found.items()]
    lines += ["", "## Stages", "", *stage_table([row for row in rows if "stage" in row])]
    missing = {text for row in rows for text in row.get("missing", [])}
    if missing:
        lines += ["", f"Not measured: {'; '.join(sorted(missing))}."]
    for bench in dict.fromkeys(row["bench"] for row in rows if "bench" in row):
        own = [row for row in rows if row.get("bench") == bench and "missing" not in row]
        if own:
            lines += ["", f"## {bench}", "", *table_of(bench)(own)]
    return "\n".join(lines) + "\n"


def table_of(bench: str) -> Callable[[list[Row]], list[str]]:
    """Return what makes the table of a benchmark."""
    if bench.startswith(("linear", "experts", "mlp")):
        return overhead_table
    return model_table if bench == "model" else plain_table


def stage_table(rows: list[Row]) -> list[str]:
    """Return a line for each stage, with the names of the tests that failed below."""
    lines = [line(["stage", "outcome", "seconds", "tests"]), line(["---"] * 4)]
    for row in rows:
        counts = [f"{row[key]} {key}" for key in ("passed", "failed", "skipped") if row.get(key)]
        lines.append(line([row["stage"], row["outcome"], row["seconds"], ", ".join(counts)]))
    failures = [name for row in rows for name in row.get("failures", [])]
    return [*lines, "", *(f"* failed: {name}" for name in failures)]


def model_table(rows: list[Row]) -> list[str]:
    """Return the models' rows, and what they mean for all layers of Qwen3-30B-A3B."""
    lines = plain_table(rows)
    for name in ("frozen", "LoRA", "full"):
        same = [row for row in rows if row["kind"] == "qwen3-30b-a3b" and row["name"] == name]
        for tokens in sorted({row["tokens"] for row in same}):
            depths = {row["layers"]: row["step_ms"] for row in same if row["tokens"] == tokens}
            if len(depths) > 1:
                lines += ["", whole_qwen3(name, depths, tokens)]
    return lines


def whole_qwen3(name: str, depths: dict[int, float], tokens: int) -> str:
    """Extrapolate the milliseconds of two depths to the whole model."""
    few, many = min(depths), max(depths)
    layer = (depths[many] - depths[few]) / (many - few)
    whole = depths[many] + (QWEN3_LAYERS - many) * layer
    return (
        f"Qwen3-30B-A3B, {name}: {layer:.2f} ms a layer, so {whole:.0f} ms for {QWEN3_LAYERS}, "
        f"{1e3 * tokens / whole:,.0f} tokens/s: a step of {tokens} tokens on a GPU. "
        "Each of 8 GPUs has that only as far as expert parallelism hides what it sends."
    )


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "none"
