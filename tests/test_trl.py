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
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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


def tiny_model() -> Any:
    return hf_models.hf_model("qwen3", vocab_size=len(tokenizer()))


def dpo_trainer(directory: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    """Return TRL's trainer of a tiny model with an adapter of which B is not zero."""
    given = {"beta": BETA, "per_device_train_batch_size": len(rows), **OPTIONS, **options}
    trainer = trl.DPOTrainer(
        model=tiny_model(),
        args=trl.DPOConfig(str(directory), **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS),
    )
    return with_adapter(trainer)


def grpo_trainer(directory: Path, **options: Any) -> Any:
    """Return the same for the loss of sampled answers; nothing is sampled."""
    given = {"num_generations": 2, "per_device_train_batch_size": 4, **OPTIONS, **options}
    trainer = trl.GRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(str(directory), **given),
        train_dataset=Dataset.from_list(CHATS).select_columns("prompt"),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS),
    )
    trainer.current_gradient_accumulation_steps = 1
    return with_adapter(trainer)


def with_adapter(trainer: Any) -> Any:
    """Fill the adapter of a trainer's model."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, factor in factors_of(trainer.model):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    trainer.model.train()
    return trainer


def factors_of(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def gradients_of(loss: Tensor, model: Any) -> dict[str, Tensor]:
    names, factors = zip(*factors_of(model), strict=True)
    return dict(zip(map(plain, names), torch.autograd.grad(loss, factors), strict=True))


def plain(name: str) -> str:
    """Return what files call a factor."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


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


# === Losses alone ===


def logprobs_of(model: Any, ids: Tensor) -> Tensor:
    """Return the log probability of each token but the first, [b, s - 1], by log_softmax."""
    logits = model(ids).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_clipped_loss_with_its_divergence_is_grpos(
    clip: tuple[float, float], weighted: bool, tmp_path: Path
) -> None:
    (low, high), kl, num_prompt = clip, 0.3, 3
    options = {"epsilon": low, "epsilon_high": high, "beta": kl, "loss_type": "bnpo"}
    trainer = grpo_trainer(tmp_path, use_bias_correction_kl=weighted, **options)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, len(tokenizer()), (4, 9), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.long).tril(3)
    own = logprobs_of(trainer.model, ids)[:, num_prompt - 1 :]
    before, reference = (
        own.detach() + 0.4 * torch.randn(own.shape, generator=generator) for _ in range(2)
    )
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.7])
    inputs = {"prompt_ids": ids[:, :num_prompt], "completion_ids": ids[:, num_prompt:]}
    inputs |= {"prompt_mask": torch.ones(4, num_prompt, dtype=torch.long), "completion_mask": mask}
    inputs |= {"old_per_token_logps": before, "ref_per_token_logps": reference}
    theirs = trainer._compute_loss(trainer.model, {**inputs, "advantages": advantages})
    # Megatron's order is [s, b].
    four = (own.T, before.T, advantages, mask.T)
    loss = policy_gradient_loss(*four, clip_low=low, clip_high=high)
    sampler = before.T if weighted else None
    divergence = kl_loss(own.T, reference.T, mask.T, sampler_logprobs=sampler)
    loss = (loss + kl * divergence) / mask.sum()
    torch.testing.assert_close(loss, theirs)
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1] * mask.sum().item()
    assert clipped > 2
    assert num_clipped(*four, clip_low=low, clip_high=high) == pytest.approx(clipped)
    same_gradients(gradients_of(loss, trainer.model), gradients_of(theirs, trainer.model))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_pair_is_trls(smoothing: float, tmp_path: Path) -> None:
    # TRL's sigmoid loss passes label_smoothing over; aot_unpaired is the same loss for one pair.
    options = {"loss_type": ["aot_unpaired"], "label_smoothing": smoothing} if smoothing else {}
    trainer = dpo_trainer(tmp_path, CHATS[:1], **options)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    counted = batch["completion_mask"][:, 1:]
    own = (logprobs_of(trainer.model, batch["input_ids"]) * counted).sum(1).chunk(2)
    with torch.no_grad(), trainer.model.disable_adapter():
        base = (logprobs_of(trainer.model, batch["input_ids"]) * counted).sum(1).chunk(2)
    loss = dpo_loss(*own, *base, beta=BETA, label_smoothing=smoothing)
    torch.testing.assert_close(loss, theirs)
    for name, value in dpo_metrics(*own, *base, beta=BETA).items():
        assert value.item() == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-4)
    same_gradients(gradients_of(loss, trainer.model), gradients_of(theirs, trainer.model))


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


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
    trainer.model.save_pretrained(directory / "adapter")
    tiny_model().save_pretrained(directory / "base")
    value = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    gradients = gradients_of(value, trainer.model)
    trainer._metrics["train"].clear()
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    end = {plain(name): p.detach().clone() for name, p in factors_of(trainer.model)}
    return directory, Run(value.item(), gradients, steps, end)


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
    gradients = {name: torch.tensor(array) for name, array in ours.gradients.items()}
    same_gradients(gradients, run.gradients)


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
        torch.testing.assert_close(torch.tensor(ours.end[name]), expected, rtol=0, atol=2e-6)
