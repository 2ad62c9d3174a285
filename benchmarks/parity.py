"""Compare adapters with an unsharded model in every layout and print the table of errors.

`make parity` runs it: one torchrun for each world size, on the CPU. The worst error of each case
goes to benchmarks/results/parity.json, and the table of these to docs/layouts.md.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _pages import ROOT, rewritten

COMMAND = "benchmarks/parity.py"
PAGE = ROOT / "docs" / "layouts.md"
RESULTS = ROOT / "benchmarks/results/parity.json"
QUANTITIES = ("loss", "objective", "dX", "gradient", "norm", "weights")
NUM_STEPS = 3
TITLES = (
    *("token losses", "objective", "dX", "gradients", "their norm"),
    f"weights after {NUM_STEPS} steps",
)


def main() -> None:
    """Run all worlds, write a Markdown table of the largest error by layout, and print it."""
    rows = [row for world_size in (1, 2, 4) for row in run_world(world_size)]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps({"date": today, "cases": rows}, indent=1) + "\n")
    partial.replace(RESULTS)
    written = table(rows, today)
    PAGE.write_text(rewritten(PAGE.read_text(), COMMAND, written))
    print(written)


def run_world(world_size: int) -> list[dict[str, Any]]:
    """Run the cases of one world size and return its rows."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(world_size), str(Path(__file__).resolve()), "--worker"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _with_root()}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(finished.stderr[-4000:])
    marked = (line for line in finished.stdout.splitlines() if line.startswith("{"))
    return [json.loads(line) for line in marked]


def _with_root() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def worker() -> None:
    """Run this world's cases; rank 0 prints one line of JSON for each."""
    import megalora.cpu
    import tests.support.mamba_on_cpu

    megalora.cpu.install()
    tests.support.mamba_on_cpu.install()
    import torch
    import torch.distributed as dist

    from tests.dist.support.cases import CASES
    from tests.dist.support.parity import errors

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in CASES:
        if case.layout.world_size != dist.get_world_size():
            continue
        found = errors(case, NUM_STEPS)
        if dist.get_rank() == 0:
            names = {"layout": str(case.layout), "kind": case.kind, "note": case.note}
            print(json.dumps({**names, "dtype": str(case.dtype), "errors": found}), flush=True)
    dist.destroy_process_group()


def table(rows: Iterable[dict[str, Any]], today: str) -> str:
    """Return a Markdown table: for each layout and precision its models and its largest errors."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["layout"], row["dtype"].removeprefix("torch.")), []).append(row)
    lines = [
        f"Largest relative errors, {today}, by `make parity`:",
        "",
        "| layout | models | " + " | ".join(TITLES) + " |",
        "|---" * (2 + len(TITLES)) + "|",
    ]
    for (layout, dtype), cases in grouped.items():
        kinds = dict.fromkeys(
            row["kind"] + (f" ({row['note']})" if row["note"] else "") for row in cases
        )
        cells = [_largest(cases, quantity) for quantity in QUANTITIES]
        half = {"bfloat16": ", bf16", "float16": ", fp16"}
        name = layout + half.get(dtype, "")
        lines.append(f"| {name} | {'; '.join(kinds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _largest(rows: list[dict[str, Any]], quantity: str) -> str:
    found = [row["errors"][quantity] for row in rows if quantity in row["errors"]]
    return f"{max(found):.0e}" if found else "-"


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
