"""--export-hf and --save-merged: refused before the first step, written on every orderly end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalora.hf.factors import LoRAFactors
from megalora.hf.families import FAMILIES
from megalora.hf.servers import refusals
from tests.support.forked import Ranks, call
from tests.support.tiny import EXPERTS, LORA, MODEL, TRAIN


def start(logs: Path, *more: object) -> Ranks:
    return Ranks(1, [*MODEL, *TRAIN, *LORA, "--train-iters", 6, *more], logs)


@pytest.mark.parametrize(
    "end",
    [["--exit-interval", "2"], ["--exit-signal-handler", "--exit-signal", "SIGUSR1"]],
    ids=["an interval", "a signal without --save"],
)
def test_an_early_end_writes_what_is_asked_for(end: list[str], tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    more = [*end, "--export-hf", adapter, "--save-merged", merged, "--train-iters", 300]
    run = start(tmp_path / "logs", *more)
    if "--exit-signal" in end:
        run.wait_until(lambda: 2 in run.losses())
        run.ask()
    run.succeed()
    assert 2 <= max(run.losses()) < 300
    assert (adapter / "adapter_config.json").is_file()
    assert (merged / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_what_has_no_hugging_face_name_is_refused_before_training(tmp_path: Path) -> None:
    more = [*EXPERTS, "--lora-targets", "all", "router", "--export-hf", tmp_path / "adapter"]
    run = start(tmp_path / "logs", *more)
    text = run.fail()
    assert "router has no adapter in Hugging Face's models: train with --lora-targets" in text
    assert run.losses() == {}


def vocab_size(flags: dict[str, Any]) -> int:
    """Return the rows that an export has, with a tokenizer of 100 tokens."""
    from megatron import training

    from megalora.training.outputs import hf_vocab_size

    patched: Any = training
    patched.get_tokenizer = lambda: SimpleNamespace(vocab_size=100)
    defaults = {"vocab_size": None, "hf_model": None, "tokenizer_type": "HuggingFaceTokenizer"}
    args: Any = SimpleNamespace(**{**defaults, **flags})
    return hf_vocab_size(args)


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({}, 100),
        ({"vocab_size": 60}, 100),
        ({"vocab_size": 128}, 128),
        ({"vocab_size": 60, "hf_model": "base"}, 60),
        ({"vocab_size": 60, "tokenizer_type": "NullTokenizer"}, 60),
    ],
    ids=str,
)
def test_no_token_is_trimmed_by_a_vocab_size_of_another_script(
    flags: dict[str, Any], rows: int
) -> None:
    assert call(vocab_size, flags) == rows


@pytest.mark.parametrize(
    ("name", "rank", "rows", "family", "refused"),
    [
        ("lm_head", 8, 1000, "llama", []),
        ("lm_head", 8, 1000, "qwen2", ["Qwen2ForCausalLM's lm_head"]),
        ("model.layers.0.self_attn.q_proj", 8, 1000, "qwen2", []),
        ("lm_head", 8, 262_144, "llama", ["258048 rows"]),
        ("lm_head", 1024, 1000, "llama", ["no rank above 512"]),
    ],
)
def test_what_vllm_refuses_is_said(
    name: str, rank: int, rows: int, family: str, refused: list[str]
) -> None:
    a, b = torch.empty(rank, 4, device="meta"), torch.empty(rows, rank, device="meta")
    found = refusals({name: LoRAFactors(a, b, 1.0)}, rows, FAMILIES[family])
    assert len(found) == len(refused)
    assert all(part in sentence for part, sentence in zip(refused, found, strict=True))
