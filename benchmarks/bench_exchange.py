"""What the commands that exchange adapters cost: seconds, CPU seconds and the largest memory.

python benchmarks/bench_exchange.py [--model qwen3-30b-a3b] [--rank 32] [--results FILE]

A PEFT adapter of random values for every linear of a well-known model, of which only config.json
is made, is imported as an adapter checkpoint, exported from it in every format, and inspected.
Each command runs in a process of its own. Memory is all that the process has at its worst, files
that it maps included, and what of that is beyond its imports. Medians of all rounds. On a machine
that others use too, CPU seconds say more than wall seconds, which have the disk in them.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _results import Row, append, line, machine

from megalora.__main__ import main as megalora
from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors
from megalora.hf.linears import locate
from megalora.hf.peft import write_adapter
from megalora.hf.weights import Placement, Shard, Weights
from megalora.model.presets import PRESETS

TOY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
}
TOY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Those that take experts of any kind.
FORMATS = ("peft", "uniform", "peft-3d")
PEFT_IMPORTS = "import megalora.hf.commands"
ALL_IMPORTS = (
    "from megalora.hf import commands, offline; offline.prepare(); "
    "from megalora.hf import one_process"
)

# Runs one command to its end in a process of its own, and returns its process id.
Start = Callable[[list[str]], int]


def configuration(model: str, *, toy: bool) -> dict[str, Any]:
    """Return the config.json of a preset, or of a small model of its kind."""
    found = dict(PRESETS[model])
    if toy:
        found |= TOY | (TOY_EXPERTS if "num_experts" in found else {})
    return found


def make(place: Path, config: dict[str, Any], rank: int, dtype: torch.dtype) -> None:
    """Write the base's config.json, and a PEFT adapter of random values for each of its linears."""
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text(json.dumps(config))
    weights, lora = Weights(config, Placement(Shard(), Shard(), Shard())), LoRAConfig(rank=rank)
    factors = {}
    for weight, size in weights.expected().items():
        name = weight.removesuffix(".weight")
        found = locate(name, weights.shape)
        # As trained by default, without routers.
        if found is not None and found[1].megatron != "mlp.router":
            own = found[1].rank(lora, weights.shape)
            a, b = torch.randn(own, size[1], dtype=dtype), torch.randn(size[0], own, dtype=dtype)
            factors[name] = LoRAFactors(a, b.mul_(1e-3), lora.scale(own))
    write_adapter(
        place / "peft",
        factors,
        base_model_name=str(place / "base"),
        num_layers=weights.shape.num_layers,
    )


def commands(place: Path) -> dict[str, list[str]]:
    """Return the commands to measure, in an order in which each has what it reads."""
    exports = {
        f"export {format}": [
            *("export", f"{place}/imported", "--hf-model", f"{place}/base"),
            *("--format", format, "--output", f"{place}/{format}-out", "--overwrite"),
        ]
        for format in FORMATS
    }
    imports = ["import", f"{place}/peft", "--hf-model", f"{place}/base"]
    return {
        "import": [*imports, "--output", f"{place}/imported", "--overwrite"],
        **exports,
        "inspect": ["inspect", f"{place}/peft"],
    }


def start_anew(words: list[str]) -> int:
    """Start Python with a command of megalora, or with code of its own."""
    given = words if words[0] == "-c" else ["-m", "megalora", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *given], **quiet).pid


def fork(words: list[str]) -> int:
    """Run a command of megalora, or code, in a copy of this process: nothing is imported twice."""
    process = get_context("fork").Process(target=_in_copy, args=(words,))
    process.start()
    return process.pid or 0


def _in_copy(words: list[str]) -> None:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        if words[0] == "-c":
            exec(words[1])
        elif status := megalora(words):
            sys.exit(status)


def run(words: list[str], start: Start) -> Row:
    """Run one command and return what it cost; RuntimeError where it fails."""
    begin = time.monotonic()
    _, status, used = os.wait4(start(words), 0)
    if status:
        raise RuntimeError(f"megalora {' '.join(words)} ended with status {status}")
    return {
        "wall_s": time.monotonic() - begin,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def measure(place: Path, rounds: int, start: Start) -> list[Row]:
    """Return a row for each command: medians, and its memory beyond that of its imports."""
    imports = {
        words: run(["-c", words], start)["peak_bytes"] for words in (PEFT_IMPORTS, ALL_IMPORTS)
    }
    found: dict[str, list[Row]] = {}
    for _ in range(rounds):
        for name, words in commands(place).items():
            found.setdefault(name, []).append(run(words, start))
            print(f"{name}: {found[name][-1]['wall_s']:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, runs in found.items():
        row = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        own = imports[PEFT_IMPORTS if name == "inspect" else ALL_IMPORTS]
        rows.append({"variant": name, **row, "above_imports_bytes": row["peak_bytes"] - own})
    return rows


def is_lossless(place: Path) -> bool:
    """Say whether the adapter that was imported and exported again is the one that was made."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    files = [[place / folder / name for folder in ("peft", "peft-out")] for name in names]
    return all(
        subprocess.run(["cmp", "--silent", *pair], check=False).returncode == 0 for pair in files
    )


def table(rows: list[Row]) -> list[str]:
    """Return Markdown with a line for each command."""
    head = ["command", "wall, s", "CPU, s", "peak, MiB", "beyond imports, MiB"]
    cells = [
        [
            row["variant"],
            *(f"{row[key]:.1f}" for key in ("wall_s", "cpu_s")),
            *(f"{row[key] / 2**20:,.0f}" for key in ("peak_bytes", "above_imports_bytes")),
        ]
        for row in rows
    ]
    return [line(head), line(["---"] * len(head)), *map(line, cells)]


def main() -> None:
    """Make an adapter, run every command on it, print the table, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=PRESETS, help="whose sizes")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", help="where to make a temporary directory, on the disk to try")
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes, in copies of this process: a rehearsal"
    )
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="exchange-", dir=options.place))
    try:
        dtype = getattr(torch, options.dtype)
        config = configuration(options.model, toy=options.toy)
        # In another process: the memory of this one is in that of those that it starts.
        maker = get_context("fork").Process(target=make, args=(place, config, options.rank, dtype))
        maker.start()
        maker.join()
        append(options.results, {"machine": machine(torch.device("cpu"))})
        rows = measure(place, options.rounds, fork if options.toy else start_anew)
        for row in rows:
            what = {
                "bench": "exchange",
                "model": options.model,
                "rank": options.rank,
                "dtype": options.dtype,
            }
            append(options.results, {**what, **row})
        print("\n".join(table(rows)))
        print(f"imported and exported again without a loss: {is_lossless(place)}")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
