"""Everything that needs a GPU, in one go: build, test the kernels, train, measure.

python benchmarks/gpu_check.py [--rounds 15] [--only build test train linear experts model]

Results go to benchmarks/results/<GPU>/, made to be committed: gpu_check.json with the date, the
versions and every number, gpu_check.md with the tables. Peers that are installed (peft, LoRAFusion)
are measured too. Nothing is measured where the kernels are wrong. Exit status 2 without a GPU.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _timing import write_json, write_text

ROOT = Path(__file__).parents[1]
STAGES: dict[str, list[list[str]]] = {
    "build": [["setup.py", "build_ext", "--inplace"]],
    "test": [
        ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "tests/test_cuda_kernels.py"]
    ],
    "train": [["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu_training.py"]],
    "linear": [["benchmarks/bench_linear.py", "--compile"]],
    "experts": [["benchmarks/bench_experts.py"]],
    "model": [["benchmarks/bench_model.py", "--kind", kind] for kind in ("dense", "moe")],
}
MEASURED = ("linear", "experts", "model")
PACKAGES = ("megatron-core", "transformer-engine", "triton", "peft", "transformers")


def main() -> int:
    """Run the stages; return 0 if nothing failed, 1 if something did, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tested or measured", file=sys.stderr)
        return 2
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-")
    results = ROOT / "benchmarks/results" / name
    found: dict[str, Any] = {"setting": setting(), "stages": {}, "benchmarks": {}}
    for stage in [stage for stage in STAGES if stage in options.only]:
        found["stages"][stage] = "passed" if run_stage(stage, options.rounds, results) else "failed"
        if stage in ("build", "test") and found["stages"][stage] == "failed":
            print("the kernels are not right here: their times would mean nothing", file=sys.stderr)
            break
    found["benchmarks"] = {
        path.stem: json.loads(path.read_text()) for path in sorted(results.glob("bench_*.json"))
    }
    write_json(results / "gpu_check.json", found)
    write_text(results / "gpu_check.md", report(found))
    print(f"\n{report(found)}\nresults are in {results}")
    return int("failed" in found["stages"].values())


def run_stage(stage: str, rounds: int, results: Path) -> bool:
    """Run the commands of a stage with this interpreter; return whether all succeeded."""
    succeeded = True
    for command in STAGES[stage]:
        if stage in MEASURED:
            kind = f"_{command[-1]}" if "--kind" in command else ""
            target = results / f"{Path(command[0]).stem}{kind}.json"
            target.unlink(missing_ok=True)
            command = [*command, "--rounds", str(rounds), "--json", str(target)]
        print(f"\n$ python {' '.join(command)}", flush=True)
        # The kernels are built for sm_80, sm_90a and sm_100a; without a CUDA toolkit that fails.
        env = {**os.environ, "MEGALORA_CUDA": "1", "PYTHONPATH": str(ROOT)}
        finished = subprocess.run([sys.executable, *command], cwd=ROOT, env=env)
        succeeded &= finished.returncode == 0
    return succeeded


def setting() -> dict[str, Any]:
    """Return the date, the device and the versions."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver and CUDA": f"{_driver()}, {torch.version.cuda}",
        **versions,
    }


def report(found: dict[str, Any]) -> str:
    """Return all results as one Markdown document."""
    lines = [f"# {found['setting']['device']}, {found['setting']['date']}", ""]
    lines += [f"* {name}: {value}" for name, value in found["setting"].items()]
    lines += [f"* {stage}: {outcome}" for stage, outcome in found["stages"].items()]
    for name, content in found["benchmarks"].items():
        lines += ["", f"## {name}", ""]
        if content.get("missing"):
            lines += [f"Not measured: {'; '.join(content['missing'])}.", ""]
        model = name.startswith("bench_model")
        lines += model_table(content["rows"]) if model else overhead_table(content["rows"])
    return "\n".join(lines) + "\n"


def overhead_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each shape: forward and backward overhead of every variant."""
    measured = ("variant", "saved_bytes", "bytes_moved", "launches")
    fixed = [key for key in rows[0] if key not in measured and not key.endswith(("_ms", "head"))]
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != "frozen"))
    shapes: dict[tuple, dict[str, str]] = {}
    for row in rows:
        cells = shapes.setdefault(tuple(row[key] for key in fixed), {})
        cells[row["variant"]] = f"{row['forward_overhead']:+.1%} / {row['backward_overhead']:+.1%}"
        if row["variant"] == "frozen":
            cells["frozen"] = f"{row['forward_ms']:.3f} / {row['backward_ms']:.3f}"
    head = [*fixed, "frozen, ms", *variants]
    lines = [_line(head), _line(["---"] * len(head))]
    for shape, cells in shapes.items():
        lines.append(_line([*shape, *(cells.get(v, "") for v in ("frozen", *variants))]))
    return ["Overhead over the frozen base, forward / backward.", "", *lines]


def model_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the whole model's rows."""
    keys = [key for key in rows[0] if key != "name"]
    lines = [_line(["", *keys]), _line(["---"] * (len(keys) + 1))]
    return lines + [_line([row["name"], *(f"{row[key]:.5g}" for key in keys)]) for row in rows]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown driver"


if __name__ == "__main__":
    sys.exit(main())
