"""Everything that needs a GPU, in one go and inside a budget of time: test, train, measure.

python benchmarks/gpu_check.py [--budget 600] [--output DIR] [--kit .gpu-kit] [--only STAGE ...]

Every stage is a process of its own with a time-out inside the budget: one that fails, hangs or is
killed never ends the others. DIR gets results.jsonl (a line after each measurement), report.md
(tables, written anew after each stage) and log.txt. A machine without a package index needs the kit
of `make gpu-kit`; elsewhere what is installed is used. `--rehearse` runs every stage at toy size on
the CPU. Exit status: 0 if nothing failed, 1 if something did, 2 without a GPU.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from _results import Row, append
from gpu_kit import ROOT, Kit, open_kit
from gpu_report import setting, write_report

# What the stages need of a checkout.
TREE = ("megalora", "tests", "benchmarks", "examples", "csrc", "pyproject.toml")
LOG_LINES = 150
LAST_WORDS_S = 3


@dataclass(frozen=True)
class Stage:
    """One command, and how long it may take on a GPU.

    words: for the Python interpreter; a script of benchmarks/ also gets --results, and --toy in a
    rehearsal. group: stages of one group run beside each other; what is timed runs alone.
    """

    name: str
    words: tuple[str, ...]
    limit_s: int
    group: str = ""
    sanitizer: str = ""


def benchmark(name: str, script: str, *words: str, limit_s: int = 60) -> Stage:
    """Return a stage that measures."""
    return Stage(name, (f"benchmarks/{script}.py", *words), limit_s)


PYTEST = ("-m", "pytest", "-q", "-rP", "-m", "gpu", "-p", "no:cacheprovider")
QWEN3 = ("--kind", "qwen3-30b-a3b", "--rank", "32")
# Twice the tokens: at 4,096 the host is the slower one.
LONG = ("--layers", "4", "--micro-batch-size", "2")
STAGES = [
    benchmark("ceilings", "bench_device"),
    Stage("smoke", ("benchmarks/run_ops.py",), 60),
    Stage("memcheck", ("benchmarks/run_ops.py",), 150, "correctness", "memcheck"),
    Stage("racecheck", ("benchmarks/run_ops.py",), 150, "correctness", "racecheck"),
    Stage(
        "kernels",
        (*PYTEST, *(f"tests/test_gpu{part}.py" for part in ("", "_linear", "_experts", "_gated"))),
        180,
        "correctness",
    ),
    Stage("training", (*PYTEST, "tests/test_gpu_training.py"), 200, "correctness"),
    benchmark("linear", "bench_linear", "--cases", "goal", "--profile", limit_s=80),
    benchmark("experts", "bench_experts", "--ranks", "4", "--profile"),
    benchmark("host", "bench_host"),
    # It compiles Megatron's SwiGLU first.
    benchmark("mlp", "bench_mlp", limit_s=90),
    benchmark("forms", "bench_linear", "--cases", "forms", limit_s=80),
    # Whole steps. All 48 layers of Qwen3-30B-A3B fit on 140 GB, but for full fine-tuning.
    benchmark("model-dense", "bench_model", "--kind", "dense", limit_s=100),
    benchmark("model-qwen3-4", "bench_model", *QWEN3, "--layers", "4", limit_s=120),
    benchmark("model-qwen3-8", "bench_model", *QWEN3, "--layers", "8", limit_s=180),
    benchmark("model-qwen3-48", "bench_model", *QWEN3, "--layers", "48", limit_s=150),
    benchmark("model-moe", "bench_model", "--kind", "moe", limit_s=90),
    benchmark("model-qwen3-4-long", "bench_model", *QWEN3, *LONG, limit_s=120),
    benchmark("compiled", "bench_linear", "--cases", "goal", "--compile", limit_s=120),
    benchmark("ranks", "bench_experts", "--ranks", "1", "16", "32"),
    benchmark("grid", "bench_linear", "--cases", "grid", limit_s=120),
]


@dataclass
class Check:
    """One run: where it works, where it writes, when it must be over."""

    tree: Path
    output: Path
    environment: dict[str, str]
    deadline: float
    rounds: int
    rehearsing: bool

    def run(self, stages: Sequence[Stage]) -> None:
        """Run stages beside each other, write what became of them."""
        started = [self._start(stage) for stage in stages]
        for stage, process, log, start in started:
            self._finish(stage, process, log, start)
        write_report(self.output)

    def _command(self, stage: Stage) -> list[str]:
        command = [sys.executable, *stage.words]
        if stage.words[0].startswith("benchmarks/bench_"):
            command += ["--results", str(self.output / "results.jsonl")]
            if stage.words[0] != "benchmarks/bench_device.py":
                command += ["--rounds", str(self.rounds)]
            if self.rehearsing and "device" not in stage.words[0] and "host" not in stage.words[0]:
                command += ["--toy"]
        if "pytest" in stage.words:
            command += ["--junitxml", str(self._xml(stage))]
            if (
                importlib.util.find_spec("xdist")
                and stage.name == "kernels"
                and not self.rehearsing
            ):
                command += ["-n", "6"]
        if stage.sanitizer and not self.rehearsing:
            tool = ["compute-sanitizer", "--tool", stage.sanitizer, "--error-exitcode", "9"]
            command = [*tool, *command]
        return command

    def _xml(self, stage: Stage) -> Path:
        return Path(self.environment["TMPDIR"]) / f"{stage.name}.xml"

    def _start(self, stage: Stage) -> tuple[Stage, subprocess.Popen | None, Path, float]:
        log = Path(self.environment["TMPDIR"]) / f"{stage.name}.log"
        environment = {**self.environment, "PYTHONFAULTHANDLER": "1"}
        if stage.sanitizer:
            # Else an access beyond a tensor stays inside a block of torch's allocator, unseen.
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if time.monotonic() > self.deadline:
            return stage, None, log, time.monotonic()
        command = self._command(stage)
        print(f"[{self.deadline - time.monotonic():4.0f} s left] {stage.name}", flush=True)
        with log.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=self.tree,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                file.write(f"cannot be started: {error}\n")
                process = None
        return stage, process, log, time.monotonic()

    def _finish(
        self, stage: Stage, process: subprocess.Popen | None, log: Path, start: float
    ) -> None:
        found: Row = {"stage": stage.name}
        if process is None:
            found["outcome"] = "failed" if log.exists() else "skipped: no time was left"
        else:
            # A rehearsal shows that every stage works, on however slow a machine.
            limit_s = stage.limit_s * (20 if self.rehearsing else 1)
            code = wait(process, min(start + limit_s, self.deadline))
            found["outcome"] = "passed" if code == 0 else f"failed: exit status {code}"
            if code is None:
                found["outcome"] = f"failed: no end after {time.monotonic() - start:.0f} s"
        found["seconds"] = round(time.monotonic() - start, 1)
        if "pytest" in stage.words and self._xml(stage).exists():
            found |= counted(self._xml(stage))
            if found["outcome"] == "passed" and found["skipped"]:
                found["outcome"] = "skipped" if not found["passed"] else "passed in part"
        append(self.output / "results.jsonl", found)
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
        with (self.output / "log.txt").open("a") as file:
            file.write("\n".join([f"==== {stage.name}", *text[:1], *text[1:][-LOG_LINES:], ""]))
        print(f"    {stage.name}: {found['outcome']}, {found['seconds']} s", flush=True)
        if "failed" in found["outcome"]:
            print("\n".join(f"    | {line[:200]}" for line in text[-8:]), flush=True)


def wait(process: subprocess.Popen, deadline: float) -> int | None:
    """Return the exit status, None where the process and all it started had to be killed.

    Python writes where each of its threads is before it is killed: faulthandler answers SIGABRT.
    """
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(xml: Path) -> Row:
    """Return how many tests passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed][:40],
    }


@contextlib.contextmanager
def workplace(kit: Kit | None) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give the tree to run in and its environment: the checkout, or a copy with the kit's library.

    What the kit brings stands behind the tree and before what is installed.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        tree, paths = ROOT, []
        if kit is not None:
            paths = [str(folder) for folder in kit.unpack(Path(temporary))]
            if kit.fits():
                tree = Path(temporary) / "tree"
                copy_tree(tree)
                shutil.copy(kit.library, tree / "megalora/_C.so")
        paths = [str(tree), *paths, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "TMPDIR": temporary, "PYTHONPATH": os.pathsep.join(paths)}
        environment["PYTHONUNBUFFERED"] = "1"
        yield tree, environment


def copy_tree(target: Path) -> None:
    """Copy what the stages need of the checkout."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    target.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)


def grouped(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Return the stages in order, those of one group together."""
    groups: list[list[Stage]] = []
    for stage in stages:
        if groups and stage.group and groups[-1][0].group == stage.group:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def main() -> int:
    """Run the stages; return 0 if nothing failed, 1 if something did, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--output", type=Path, help="directory for the results, a new one")
    parser.add_argument("--budget", type=float, default=1200, help="seconds for everything")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu-kit")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="STAGE",
        help=f"in this order: {', '.join(names)}",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget - 5
    if not torch.cuda.is_available() and not options.rehearse:
        print("no CUDA device: nothing was tested or measured", file=sys.stderr)
        return 2
    options.output = options.output or ROOT / f"gpu-check/{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    results = options.output / "results.jsonl"
    if results.exists():
        parser.error(f"--output {options.output} has results already: give a new directory")
    kit = open_kit(options.kit) if options.kit.is_dir() else None
    append(results, {"setting": setting(kit)})
    with workplace(kit) as (tree, environment):
        if options.rehearse:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        rounds = 1 if options.rehearse else options.rounds
        check = Check(
            tree, options.output.resolve(), environment, deadline, rounds, options.rehearse
        )
        stages = {stage.name: stage for stage in STAGES}
        for group in grouped([stages[name] for name in options.only]):
            check.run(group)
    print((options.output / "report.md").read_text())
    print(f"results are in {options.output}")
    return int('"outcome": "failed' in results.read_text())


if __name__ == "__main__":
    sys.exit(main())
