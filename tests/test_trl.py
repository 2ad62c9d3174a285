"""Losses, tokens and training are those of the real TRL, whose code runs here."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megalora.data.preferences import encode_pairs, gather_pairs
from megalora.data.tokenizers import encoder_for
from megalora.losses import dpo_loss, dpo_metrics, kl_loss, num_clipped, policy_gradient_loss
from tests.support import hf_models, in_megatron
from tests.support.chat_templates import CHATML, hugging_face_tokenizer
from tests.support.forked import call

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

USER = {"role": "user", "content": "Hello?"}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


CHATS = [
    {"prompt": [USER], "chosen": [said("Hello!")], "rejected": [said("No.")]},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, USER, said("Hello!"), USER],
        "chosen": [said("Good bye.")],
        "rejected": [said("And now? And now? And now?")],
    },
    {"prompt": [USER] * 3, "chosen": [said("kind")], "rejected": [said("Hello! Be kind.")]},
    {"prompt": [USER], "chosen": [said("Good bye. Be kind.")], "rejected": [said("x")]},
]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in CHATS]
TEXTS = [
    {"prompt": "Hello?", "chosen": " Hello!", "rejected": " No."},
    {"prompt": "And now? Good", "chosen": " bye.", "rejected": " Hello!"},
    {"prompt": "He", "chosen": "llo", "rejected": "y"},  # the prompt ends in the middle of a token
    {"prompt": "Be kind", "chosen": ". And now? And now?", "rejected": "<|eos|>"},
]
IMPLICIT_TEXTS = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "Hello? No, and now?", "rejected": "Hello? Now."},
]
KINDS = {"chats": CHATS, "implicit": IMPLICIT, "texts": TEXTS, "implicit texts": IMPLICIT_TEXTS}
BETA, MAX_LENGTH = 0.3, 48
# What a run on the CPU needs, and what Megatron does too.
OPTIONS = {
    **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"},
    **{"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 3},
    **{"lr_scheduler_type": "constant", "learning_rate": 1e-2, "adam_epsilon": 1e-3},
}


@functools.cache
def tokenizer() -> Any:
    made = hugging_face_tokenizer(CHATML, bos=True)
    made.pad_token = made.eos_token
    return made


def dpo_trainer(directory: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    """Return TRL's trainer of a tiny model with an adapter of which B is not zero."""
    given = {"beta": BETA, "per_device_train_batch_size": len(rows), **OPTIONS, **options}
    config = trl.DPOConfig(str(directory), **given)
    model = hf_models.hf_model("qwen3", vocab_size=len(tokenizer()))
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = trl.DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=linears),
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, factor in factors_of(trainer.model):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    return trainer


def factors_of(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_answers_are_trls(kind: str, tmp_path: Path) -> None:
    rows, own = KINDS[kind], encoder_for(tokenizer())
    theirs = dpo_trainer(tmp_path, rows, max_length=None).train_dataset
    for row, pair in zip(theirs, encode_pairs(rows, own), strict=True):
        for name, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert tokens.ids == row["prompt_ids"] + row[f"{name}_ids"]
            assert tokens.trained == [False] * len(row["prompt_ids"]) + [True] * len(
                row[f"{name}_ids"]
            )


# === A whole run ===


class Run(NamedTuple):
    """What TRL made of a few pairs."""

    loss: float
    gradients: dict[str, Tensor]
    steps: list[dict[str, float]]
    end: dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Train with TRL; return a directory with its base and the adapter that it began with."""
    directory = tmp_path_factory.mktemp("trl")
    trainer = dpo_trainer(directory, CHATS, max_length=MAX_LENGTH)
    base = trainer.model.get_base_model()
    trainer.model.save_pretrained(directory / "adapter")
    hf_models.hf_model("qwen3", vocab_size=len(tokenizer())).save_pretrained(directory / "base")
    assert base.config.vocab_size == len(tokenizer())
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    value.backward()
    gradients = {plain(name): p.grad.clone() for name, p in factors_of(trainer.model)}
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    end = {plain(name): p.detach().clone() for name, p in factors_of(trainer.model)}
    return directory, Run(value.item(), gradients, steps, end)


def plain(name: str) -> str:
    """Return what files call a factor."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


@pytest.fixture(scope="module")
def ours(theirs: tuple[Path, Run]) -> in_megatron.Preferring:
    directory, _ = theirs
    pairs = gather_pairs(encode_pairs(CHATS, encoder_for(tokenizer())), "chats", MAX_LENGTH)
    assert (len(pairs), pairs.num_cut, pairs.num_beyond) == (3, 1, 1)
    return call(in_megatron.prefer, directory, list(pairs))


def test_loss_and_every_gradient_are_trls(
    theirs: tuple[Path, Run], ours: in_megatron.Preferring
) -> None:
    _, run = theirs
    assert ours.metrics[0]["loss"] == pytest.approx(run.loss, rel=1e-5)
    assert ours.gradients.keys() == run.gradients.keys()
    for name, expected in run.gradients.items():
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(
            torch.tensor(ours.gradients[name]), expected, rtol=1e-4, atol=1e-5
        )


def test_steps_and_the_adapters_after_them_are_trls(
    theirs: tuple[Path, Run], ours: in_megatron.Preferring
) -> None:
    _, run = theirs
    assert len(run.steps) == len(ours.metrics) == 3
    for number, logged in enumerate(run.steps):
        for name, value in ours.metrics[number].items():
            assert value == pytest.approx(logged[name], rel=1e-3, abs=2e-4), (number, name)
        assert ours.norms[number] == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert run.steps[-1]["loss"] < run.steps[0]["loss"]
    for name, expected in run.end.items():
        torch.testing.assert_close(torch.tensor(ours.end[name]), expected, rtol=0, atol=2e-5)
