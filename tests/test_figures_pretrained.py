"""Runs of the article's experiments on a pretrained model, here a tiny one of Hugging Face's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import forked

LAYERS, TOKENS = 2, 320
BASES = ("model.layers.1.mlp.down_proj", "lm_head")
# Rows of Megatron's linears: query, key and value, projection, gate and up, down, unembedding.
LINEARS = LAYERS * (32 * (64 + 2 * 32) + 64 * 32 + 32 * 80 + 40 * 32) + TOKENS * 32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what runs on a tiny tied model give, all of one process."""
    from tests.support.chat_templates import hugging_face_tokenizer
    from tests.support.hf_models import hf_model

    folder = tmp_path_factory.mktemp("pretrained")
    model = hf_model("llama", tied=True, vocab_size=TOKENS)
    model.save_pretrained(folder / "tiny")
    hugging_face_tokenizer("").save_pretrained(folder / "tiny")
    rows = [{"prompt": f"What is {n}?\n", "completion": f"It is {n % 3}."} for n in range(400)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = model(ids).logits
    found = forked.call(run_all, folder / "tiny", str(folder / "rows.jsonl"), ids)
    weights = {name: model.get_submodule(name).weight.detach().numpy() for name in BASES}
    return found | {"wanted": wanted, "weights": weights}


def run_all(directory: Path, rows: str, ids: torch.Tensor) -> dict[str, Any]:
    """Build the model, train it in several ways, and measure an adapter by the letter."""
    from benchmarks.regret import pretrained
    from benchmarks.regret.job import Job
    from benchmarks.regret.model import Trainer, start_megatron
    from megalora.hf.factors import LoRAFactors
    from megalora.hf.inspect import measure
    from megalora.model.config_json import read_config

    pretrained.DATASET = rows
    start_megatron()
    model = pretrained.build(directory, "fp32")
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        logits = model(ids, positions, None)
    common: dict[str, Any] = {"seed": 0, "base": "pretrained", "model": "tiny", "steps": 8}
    common |= {"seq_length": 32, "batch_size": 12}
    jobs = {
        "full": Job(rank=0, lr=3e-3, precision="fp32", **common),
        "bf16": Job(rank=0, lr=3e-3, precision="bf16", **common),
        "lora": Job(rank=4, lr=3e-2, precision="fp32", **common),
        "attention": Job(rank=4, lr=3e-2, precision="fp32", targets=("attn",), **common),
    }
    short = Trainer(pretrained.build(directory, "bf16"), None, 1e-3, adam_eps=1e-8)
    torch.manual_seed(0)
    a, b = torch.randn(3, 40), torch.randn(50, 3)
    return {
        "logits": logits.numpy(),
        "trained": {n for n, p in model.named_parameters() if p.requires_grad},
        "results": {how: pretrained.run(job, directory) for how, job in jobs.items()},
        "weights of Adam": {p.dtype for g in short.optimizer.param_groups for p in g["params"]},
        "update": (measure("", LoRAFactors(a, b, 2.0)).spectral_update, (2.0 * b @ a).numpy()),
        "base": pretrained.base_norms(directory, BASES),
        "tied": read_config(directory)["tie_word_embeddings"],
    }


def test_the_model_is_that_of_transformers(found: dict[str, Any]) -> None:
    torch.testing.assert_close(
        torch.from_numpy(found["logits"]), found["wanted"], rtol=0, atol=1e-4
    )
    assert found["wanted"].std() > 0.1, "logits that say nothing: vacuous"


def test_full_fine_tuning_trains_the_weights_that_adapters_are_on(found: dict[str, Any]) -> None:
    assert found["tied"]
    leaves = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")
    assert all(
        name.endswith(tuple(f"{leaf}.weight" for leaf in leaves)) for name in found["trained"]
    )
    assert found["results"]["full"].trainable == LINEARS


def test_every_method_starts_from_the_same_loss_on_the_same_rows_and_learns(
    found: dict[str, Any],
) -> None:
    results = found["results"]
    start = results["full"].curve[0]
    for how, result in results.items():
        assert result.curve[0] == pytest.approx(start, rel=1e-2 if how == "bf16" else 1e-5)
        assert result.final < 0.9 * start, how
        assert result.cpu_seconds > 0


def test_bf16_learns_as_fp32_does(found: dict[str, Any]) -> None:
    full, short = found["results"]["full"].curve, found["results"]["bf16"].curve
    assert short == pytest.approx(full, rel=0.03)
    assert short != pytest.approx(full, rel=1e-6), "bf16 is not used"
    assert found["weights of Adam"] == {torch.float32}


def test_adapters_are_measured_module_by_module(found: dict[str, Any]) -> None:
    norms = {how: result.norms for how, result in found["results"].items()}
    assert norms["full"] is None
    assert norms["lora"].modules == LAYERS * 7 + 1
    assert norms["attention"].modules == LAYERS * 4
    # A starts at U(-1, 1) / sqrt(d_in), B at zero.
    assert 0.3 < norms["lora"].a < 3
    assert norms["lora"].b > 0.01
    assert norms["lora"].relative > 0.01


def test_spectral_norms_are_those_of_the_whole_matrices(found: dict[str, Any]) -> None:
    norm, update = found["update"]
    assert norm == pytest.approx(np.linalg.norm(update, 2), rel=1e-5)
    for module, value in found["base"].items():
        assert value == pytest.approx(np.linalg.norm(found["weights"][module], 2), rel=1e-5)
