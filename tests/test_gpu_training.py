"""Training on a GPU follows training on the CPU; benchmarks/gpu_check.py runs these.

MEGALORA_REHEARSE=1 runs the CPU's runs and those of the GPU's that a CPU can take the place of.
"""

import concurrent.futures
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support.forked import ROOT, free_port, with_root
from tests.support.tiny import EXPERTS, LORA, MODEL, TRAIN
from tests.support.watchdog import run_watched

REHEARSING = "MEGALORA_REHEARSE" in os.environ
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSING, reason="no CUDA device"),
]
NUM_ITERS = 8
Losses = dict[str, list[float] | Exception]
RUNS = {
    "CPU": ["--cpu"],
    "CPU, bf16": ["--cpu", "--bf16"],
    "GPU": [],
    "GPU, bf16": ["--bf16"],
    "GPU, TE, bf16": ["--bf16", "--transformer-impl", "transformer_engine"],
}


def losses(model: list[str], dataset: Path, *more: str, te: bool = False) -> list[float]:
    """Train by the example script in one process, beside the dataset; return the logged losses.

    te: let it see TransformerEngine, where that is installed in a folder of its own.
    """
    words = [word for word in model if word not in ("--vocab-size", "255")]
    data = ["--byte-tokenizer", "--dataset", str(dataset), "--train-iters", str(NUM_ITERS)]
    paths = with_root().split(os.pathsep)
    if not te:
        paths = [path for path in paths if not (Path(path) / "transformer_engine").exists()]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": os.pathsep.join(paths)}
    logs = Path(tempfile.mkdtemp(dir=dataset.parent))
    finished = run_watched(
        [sys.executable, "examples/pretrain_lora.py", *words, *TRAIN, *LORA, *data, *more],
        logs,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-5000:]
    lines = [line for line in finished.stdout.splitlines() if "lm loss:" in line]
    return [float(line.split("lm loss:")[1].split("|")[0]) for line in lines]


def all_runs(kind: str, directory: Path) -> Losses:
    """Train one model in every way side by side; return the losses, or what ended the run."""
    dataset = directory / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(12) for b in range(9)]
    dataset.write_text("\n".join(json.dumps(row) for row in rows))
    model = [*MODEL, *EXPERTS] if kind == "experts" else MODEL
    # The base's start values differ between devices, so all read one that the CPU saved.
    base = str(directory / "base")
    losses(model, dataset, "--cpu", "--lora-rank", "0", "--save", base, "--train-iters", "1")
    common = ("--pretrained-checkpoint", base, "--lr", "2e-3")
    found: Losses = {}

    def run(name: str) -> None:
        more = list(RUNS[name])
        if "TE" in name and kind == "experts":
            more.append("--moe-grouped-gemm")
        try:
            found[name] = losses(model, dataset, *common, *more, te="TE" in name)
        except (AssertionError, pytest.fail.Exception) as error:
            found[name] = error

    with concurrent.futures.ThreadPoolExecutor(1 if REHEARSING else len(RUNS)) as pool:
        list(pool.map(run, [name for name in RUNS if HAS_TE or "TE" not in name]))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    """Return the losses of all runs of both kinds of models."""
    kinds = ("dense", "experts")
    directories = [tmp_path_factory.mktemp(kind) for kind in kinds]
    with concurrent.futures.ThreadPoolExecutor(1 if REHEARSING else 2) as pool:
        found = dict(zip(kinds, pool.map(all_runs, kinds, directories), strict=True))
    for kind, own in found.items():
        print(kind, json.dumps(own, default=lambda error: str(error)[-1500:]))
    return found


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("GPU", "CPU", 1e-3),
        ("GPU, bf16", "CPU, bf16", 1e-2),
        pytest.param(
            *("GPU, TE, bf16", "CPU, bf16", 1e-2),
            marks=[
                pytest.mark.skipif(not HAS_TE, reason="no TransformerEngine"),
                pytest.mark.skipif(REHEARSING, reason="TransformerEngine needs a GPU"),
            ],
        ),
    ],
)
def test_a_gpu_trains_as_the_cpu_does(
    runs: dict[str, Losses], kind: str, name: str, reference: str, tolerance: float
) -> None:
    got, expected = runs[kind][name], runs[kind][reference]
    for losses_or_error in (got, expected):
        if isinstance(losses_or_error, Exception):
            raise losses_or_error
    assert isinstance(expected, list)
    assert len(expected) == NUM_ITERS
    assert expected[-1] < expected[0]
    assert got == pytest.approx(expected, rel=tolerance)
