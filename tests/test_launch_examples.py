"""The example scripts run as they are, at toy size on the CPU."""

import os
import re
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from tests.support.forked import ROOT, SCRIPT, Ranks, free_port, with_root
from tests.support.tiny import LORA, MODEL, TRAIN
from tests.support.watchdog import run_watched

EXAMPLES = ROOT / "examples"
# How lines begin that say something of this run: megalora's, and those of Megatron that report.
USUAL = re.compile(
    r"megalora: |WARNING: dataset |> | > |>>> |INFO:|\[| \[|-+ (end of )?arguments -+|  \w+ "
    r"|using |setting |Number of virtual stages|time to initialize|Params for bucket|\t"
    r"|(train|valid|test) data: |    (train|validation|test): |    [\w/-]+ \.{3,}"
    r"|done with setup|training \.\.\.|Overwriting rerun_state_machine|$"
    # Rank 0 reckons the memory beside the last rank, which logs the first step.
    r"|(Total n|N)umber of |compute_activation_memory|Activation memory |Theoretical memory "
)


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
    output = finished.stderr + finished.stdout
    assert finished.returncode == 0, output[-5000:]
    return output


MOE = pytest.param("train_qwen3_30b_a3b.sh", marks=pytest.mark.full)


@pytest.mark.parametrize("script", ["train_llama3_8b.sh", MOE])
def test_an_example_trains_and_saves_and_nothing_hides_what_it_says(
    tmp_path: Path, script: str
) -> None:
    output = run(tmp_path, script, OUT=str(tmp_path / "out"))
    assert_trained(output, tmp_path / "out")
    assert unusual_before_the_first_step(output) == []


def unusual_before_the_first_step(output: str) -> list[str]:
    """Return the lines that stand between a user and what a run says until it trains."""
    start, _, _ = output.partition("iteration        1/")
    return [line for line in start.splitlines() if not USUAL.match(line)]


def test_a_warning_of_somebody_else_is_noticed() -> None:
    lines = ["file.py:25: UserWarning: x", "  warnings.warn(", "WARNING:name:y", "W11 file.py:1] z"]
    assert unusual_before_the_first_step("\n".join([*lines, "> LoRA: 3 trained"])) == lines


def test_what_the_example_of_experts_gives_torchrun_trains_and_saves(tmp_path: Path) -> None:
    python, words = tmp_path / "python", tmp_path / "words"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {words}\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    run(tmp_path, "train_qwen3_30b_a3b.sh", OUT=str(out), PYTHON=str(python))
    module, name, *given = words.read_text().splitlines()
    assert [module, name] == ["-m", "torch.distributed.run"]
    torchrun = parse_args(given)
    assert torchrun.standalone
    script, count = ROOT / torchrun.training_script, int(torchrun.nproc_per_node)
    flags, logs = torchrun.training_script_args, tmp_path / "logs"
    ranks = Ranks(count, flags, logs, script=script, by_megalora=False)
    assert_trained(ranks.succeed().text(), out)


def assert_trained(output: str, out: Path) -> None:
    assert "> LoRA: " in output
    assert "lm loss" in output
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_the_slurm_script_launches_any_script(tmp_path: Path) -> None:
    # Of more ranks under torchrun is the test of train_llama3_8b.sh.
    flags = [*MODEL, *TRAIN, *LORA, "--save", str(tmp_path / "out"), "--train-iters", "3"]
    output = run(
        tmp_path, "slurm_multinode.sbatch", str(SCRIPT), *flags, NPROC="1", PORT=str(free_port())
    )
    assert "> LoRA: " in output
    assert (tmp_path / "out" / "iter_0000003" / "integrity.json").is_file()
