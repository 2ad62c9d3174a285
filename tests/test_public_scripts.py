"""The flags of public Megatron scripts train, at toy size, with --lora-rank and nothing else."""

import math
import re
from pathlib import Path

import pytest

from tests.support.forked import Ranks
from tests.support.public_scripts import (
    DEEPSEEK_V3,
    LLAMA3_8B,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    tiny_flags,
)

# Each on two ranks, by one kind of its own parallelism.
SCRIPTS = {
    "Llama-3-8B, tensor parallel": (
        LLAMA3_8B,
        {"--num-layers": "2", "--tensor-model-parallel-size": "2"},
        [],
    ),
    "Mixtral-8x7B, pipeline parallel": (
        MIXTRAL_8X7B,
        {
            "--num-layers": "2",
            "--pipeline-model-parallel-size": "2",
            "--expert-model-parallel-size": "1",
        },
        ["--vocab-size", 128],
    ),
    "Qwen3-30B-A3B, expert parallel": (
        QWEN3_30B_A3B,
        {
            "--num-layers": "2",
            "--tensor-model-parallel-size": "1",
            "--num-experts": "16",
        },
        # Its launcher gives these.
        ["--train-samples", 4, "--eval-iters", 1, "--eval-interval", 100, "--log-interval", 1]
        + ["--save-interval", 20],
    ),
    "DeepSeek-V3, a pipeline with a layout": (
        DEEPSEEK_V3,
        {
            "--num-layers": "3",
            "--moe-layer-freq": "([0]*1+[1]*2)",
            "--num-experts": "16",
            "--tensor-model-parallel-size": "1",
            "--pipeline-model-parallel-size": "2",
            "--pipeline-model-parallel-layout": "Ett|tmL",
            "--expert-model-parallel-size": "1",
            "--moe-token-dispatcher-type": "alltoall",
        },
        ["--vocab-size", 128],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_public_script_trains_adapters(name: str, tmp_path: Path) -> None:
    script, changed, more = SCRIPTS[name]
    given = [*tiny_flags(script, changed), *more, "--tensorboard-dir", tmp_path / "tensorboard"]
    given += ["--transformer-impl", "local", "--save", tmp_path / "run", "--load", tmp_path / "run"]
    # An expert's rank is rank / top-k.
    run = Ranks(2, [*given, "--lora-rank", 16], tmp_path / "logs").succeed()
    assert sorted(run.losses()) == [1, 2]
    assert all(map(math.isfinite, run.losses().values()))
    norms = [float(norm) for norm in re.findall(r"grad norm: ([0-9.]+)", run.text())]
    assert norms
    assert min(norms) > 0
    assert (tmp_path / "run" / "iter_0000002" / "integrity.json").is_file()
