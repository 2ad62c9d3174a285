"""The example scripts run as they are, at toy size on the CPU."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.forked import ROOT, SCRIPT, free_port, with_root
from tests.support.tiny import LORA, MODEL, TRAIN
from tests.support.watchdog import run_watched

EXAMPLES = ROOT / "examples"


def run(logs: Path, script: str, *flags: str, **env: str) -> str:
    finished = run_watched(
        ["bash", str(EXAMPLES / script), *flags],
        logs,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": with_root(),
            "CPU": "1",
            "OMP_NUM_THREADS": "1",
            "MAX_RESTARTS": "0",
            **env,
        },
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-5000:]
    return output


@pytest.mark.parametrize("script", ["train_qwen3_30b_a3b.sh", "train_llama3_8b.sh"])
def test_an_example_trains_and_saves(tmp_path: Path, script: str) -> None:
    output = run(tmp_path, script, OUT=str(tmp_path / "out"))
    assert "> LoRA: " in output
    assert "lm loss" in output
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_the_slurm_script_launches_any_script(tmp_path: Path) -> None:
    saved = ["--save", str(tmp_path / "out"), "--train-iters", "3"]
    flags = [*MODEL, *TRAIN, *LORA, *saved, "--pipeline-model-parallel-size", "2"]
    output = run(
        tmp_path, "slurm_multinode.sbatch", str(SCRIPT), *flags, NPROC="2", PORT=str(free_port())
    )
    assert "> LoRA: " in output
    assert (tmp_path / "out" / "iter_0000003" / "integrity.json").is_file()
