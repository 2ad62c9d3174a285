"""A run on a GPU goes from Megatron's start through its first steps, on megatron-core from pip.

No GPU is needed: `tests.support.as_on_gpu` fakes the devices; Megatron is as a GPU run
finds it.
"""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.examples import run_example
from tests.support.forked import ROOT, SCRIPT, Ranks, free_port
from tests.support.tiny import EXPERTS, LORA, TRAIN
from tests.support.watchdog import run_watched

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="TransformerEngine's kernels need a GPU",
)
# What people type: Megatron's defaults ask for TransformerEngine's layers and apex's kernels.
MODEL = shlex.split("""
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
--position-embedding-type rope --make-vocab-size-divisible-by 64 --seq-length 32
--max-position-embeddings 32 --bf16 --attention-dropout 0 --hidden-dropout 0
""")
GROUPED = shlex.split("--group-query-attention --num-query-groups 2 --kv-channels 16")
LATENT = shlex.split("""
--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 16 --qk-head-dim 8
--qk-pos-emb-head-dim 8 --v-head-dim 12
""")
# A dense layer and one of experts, so that a single start of Megatron has both.
MIXED = [*GROUPED, *EXPERTS, "--moe-layer-freq", "[0,1]", "--use-distributed-optimizer"]
TRAINED = [*TRAIN, *LORA, "--train-iters", "3"]


def on_fake_gpu(logs: Path, *words: object) -> str:
    """Return what a program wrote that ended well on the fake GPU, in one process."""
    logs.mkdir()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    finished = run_watched(
        [sys.executable, "-m", "tests.support.as_on_gpu", *(str(word) for word in words)],
        logs,
        cwd=ROOT,
        env={**os.environ, **alone, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
    )
    text = finished.stdout + finished.stderr
    assert finished.returncode == 0, text[-5000:]
    return text


def losses(text: str) -> list[float]:
    lines = [line for line in text.splitlines() if "lm loss:" in line]
    return [float(line.split("lm loss:")[1].split("|")[0]) for line in lines]


def test_the_example_trains_as_on_the_cpu(tmp_path: Path) -> None:
    dataset = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(12) for b in range(9)]
    dataset.write_text("\n".join(json.dumps(row) for row in rows))
    words = [*MODEL, *MIXED, *TRAINED, "--byte-tokenizer", "--dataset", dataset, "--save"]
    text = on_fake_gpu(
        tmp_path / "gpu-logs", ROOT / "examples" / "pretrain_lora.py", *words, tmp_path / "gpu"
    )
    on_cpu = run_example("pretrain_lora.py", [*words, tmp_path / "cpu"], tmp_path / "logs")
    assert "Megatron runs on the CPU" not in text
    assert "without TransformerEngine this run has transformer_impl=local" in text
    assert "without apex this run has gradient_accumulation_fusion=False" in text
    assert losses(text) == pytest.approx(losses(on_cpu), rel=1e-3)
    assert len(losses(text)) == 3
    # The optimizer's steps are in it.
    assert (tmp_path / "gpu" / "iter_0000003" / "integrity.json").is_file()


def test_megalora_run_trains_as_on_the_cpu(tmp_path: Path) -> None:
    words = [*MODEL, *LATENT, *TRAINED, "--vocab-size", 255]
    text = on_fake_gpu(tmp_path / "gpu-logs", "run", SCRIPT, *words)
    on_cpu = Ranks(1, words, tmp_path / "logs").succeed()
    assert losses(text) == pytest.approx(list(on_cpu.losses().values()), rel=1e-3)
    assert len(losses(text)) == 3
