"""Training on a GPU follows training on the CPU; benchmarks/gpu_check.py runs these."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.forked import ROOT, free_port
from tests.tiny import EXPERTS, LORA, MODEL, TRAIN
from tests.watchdog import run_watched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUM_ITERS = 8


def losses(model: list[str], dataset: Path, *more: str) -> list[float]:
    """Train by the example script in one process, beside the dataset; return the logged losses."""
    words = [word for word in model if word not in ("--vocab-size", "255")]
    data = ["--byte-tokenizer", "--dataset", str(dataset), "--train-iters", str(NUM_ITERS)]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    finished = run_watched(
        [sys.executable, "examples/pretrain_lora.py", *words, *TRAIN, *LORA, *data, *more],
        dataset.parent,
        cwd=ROOT,
        env={**os.environ, **env, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-5000:]
    lines = [line for line in finished.stdout.splitlines() if "lm loss:" in line]
    return [float(line.split("lm loss:")[1].split("|")[0]) for line in lines]


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_gpu_trains_as_the_cpu_does(kind: str, tmp_path: Path) -> None:
    dataset = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(12) for b in range(9)]
    dataset.write_text("\n".join(json.dumps(row) for row in rows))
    model = [*MODEL, *EXPERTS] if kind == "experts" else MODEL
    # The base's start values differ between devices, so both read one that the CPU saved.
    base = str(tmp_path / "base")
    losses(model, dataset, "--cpu", "--lora-rank", "0", "--save", base, "--train-iters", "1")
    common = ("--pretrained-checkpoint", base, "--lr", "2e-3")
    on_cpu = losses(model, dataset, *common, "--cpu")
    on_gpu = losses(model, dataset, *common)
    assert len(on_cpu) == NUM_ITERS
    assert on_cpu[-1] < on_cpu[0]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
