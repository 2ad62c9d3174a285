"""`--lr auto` sets the rate of the article's rule; separate rates reach Megatron's optimizer."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megalora import LoRAConfig
from megalora.training import auto_lr
from megalora.training.rates import check_rates
from tests.support.examples import run_example
from tests.support.forked import Ranks, call
from tests.support.tiny import EXPERTS, LORA, MODEL, TRAIN

SHORT = ["--train-iters", "2", "--lr", "auto"]
# 5e-5 * 15 (fewer than 100 steps) * (2000 / 64) ** 0.0775: FACTS' rule at hidden size 64.
QWEN_RATE = 9.7933e-4


def logged_rates(text: str) -> list[float]:
    """Return the rates that Megatron logged, one for each iteration."""
    parts = text.split("learning rate: ")[1:]
    return [float(part.split("|")[0]) for part in parts]


def run(directory: Path, *flags: str) -> Ranks:
    """Start `megalora run` of a script that knows nothing of megalora."""
    return Ranks(1, [*MODEL, *TRAIN, *SHORT, *flags], directory)


@pytest.mark.parametrize(
    ("given", "rate"),
    [(["--lr", "auto"], auto_lr.AUTO), (["--lr=auto"], auto_lr.AUTO), (["--lr", "1e-3"], 1e-3)],
)
def test_auto_is_a_rate_of_megatrons_own_flag(given: list[str], rate: float) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    auto_lr.add_auto_lr_args(parser)
    assert parser.parse_args(given).lr == rate


NUMBERS = pytest.mark.bad_input("a number that is not one")


@NUMBERS
@pytest.mark.parametrize("given", ["inf", "-inf", "nan", "1e999"])
def test_a_rate_that_is_not_finite_is_not_taken_for_auto(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    auto_lr.add_auto_lr_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--lr={given}"])
    assert f"--lr: {given} is no rate: give a finite number, or auto" in capsys.readouterr().err


@NUMBERS
@pytest.mark.parametrize(
    ("ratio", "rate"), [(1.0, float("nan")), (1.0, float("inf")), (1e300, 1e30)], ids=str
)
@pytest.mark.parametrize("name", ["lr", "min_lr", "decoupled_lr", "decoupled_min_lr"])
def test_the_rates_of_both_factors_are_finite(name: str, ratio: float, rate: float) -> None:
    config, rates = LoRAConfig(rank=8, lr_ratio=ratio), {"lr": 1e-3, "decoupled_lr": None}
    check_rates(config, rates)
    with pytest.raises(ValueError, match=f"^{name} is .* for lora_B.*: both must be finite"):
        check_rates(config, {**rates, name: rate})


def parsed_again(flags: list[str]) -> tuple[float, list[str]]:
    """Return the rate that Megatron reads where it parses without a script's flags, and argv."""
    from megatron.training.arguments import parse_args

    from megalora import launch

    sys.argv = ["train.py", *flags]
    launch.prepare_megatron(sys.argv)
    return parse_args(ignore_unknown_args=True).lr, sys.argv[1:]


def test_megatron_may_parse_auto_without_a_scripts_flags() -> None:
    flags = ["--lr", "auto", "--lora-rank", "8"]
    assert call(parsed_again, flags) == (auto_lr.AUTO, flags)


def test_an_unchanged_script_trains_at_the_rate_of_the_rule(tmp_path: Path) -> None:
    text = run(tmp_path, *LORA, "--lora-family", "qwen").succeed().text()
    assert logged_rates(text) == pytest.approx([QWEN_RATE] * 2, rel=1e-4)
    assert "LoRA 9.79e-04" in text, "the recommendation is printed"
    assert "15 x, family qwen" in text


def test_the_example_trains_at_the_rate_of_the_rule(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "What is said three times is true. " * 40}) + "\n")
    model = [*MODEL, *EXPERTS, "--byte-tokenizer", "--dataset", str(data), "--cpu"]
    vocabulary = model.index("--vocab-size")
    del model[vocabulary : vocabulary + 2]
    flags = [*model, *TRAIN, *SHORT, *LORA, "--lora-family", "llama"]
    text = run_example("pretrain_lora.py", flags, tmp_path / "logs")
    # 5e-5 * 15 * (2000 / 64) ** 0.781
    assert logged_rates(text) == pytest.approx([1.10291e-2] * 2, rel=1e-4)


def test_a_model_of_unknown_family_is_told_what_to_do(tmp_path: Path) -> None:
    error = run(tmp_path, *LORA).fail()
    assert "family is unknown: name the one that it is built like by --lora-family" in error


def parsed(**changes: Any) -> argparse.Namespace:
    """Return the parsed flags of a dense model whose rate is auto."""
    fields: dict[str, Any] = {
        **dict.fromkeys(("num_layers", "num_attention_heads"), 4),
        **dict.fromkeys(("hidden_size", "padded_vocab_size"), 64),
        **{f"{kind}_model_parallel_size": 1 for kind in ("tensor", "pipeline", "expert")},
        "expert_tensor_parallel_size": None,
        "use_distributed_optimizer": False,
        "untie_embeddings_and_output_weights": True,
        "lr_decay_style": "linear",
        "lora_family": "qwen",
        "global_batch_size": 8,
        "train_iters": 1000,
        "world_size": 1,
        "min_lr": 0.0,
        "rank": 0,
        "lr": auto_lr.AUTO,
    }
    return argparse.Namespace(**{**fields, **changes})


def test_a_schedule_that_is_not_constant_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    auto_lr.auto_rate(parsed(), LoRAConfig(rank=8))
    assert "the rule is for --lr-decay-style constant" in capsys.readouterr().out
    auto_lr.auto_rate(parsed(lr_decay_style="constant"), LoRAConfig(rank=8))
    assert "lr-decay-style" not in capsys.readouterr().out


def test_a_rate_that_was_given_stays() -> None:
    assert auto_lr.auto_rate(parsed(lr=1e-3, lora_family=None), None) is None


def test_auto_without_lora_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no LoRA: set --lora-rank, or --lr to a number"):
        auto_lr.auto_rate(parsed(), None)


def test_a_smallest_rate_above_the_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_lr is 0.5, above the rate 0.000653"):
        auto_lr.auto_rate(parsed(min_lr=0.5), LoRAConfig(rank=8))


LR = 1e-3


def first_updates(
    changes: dict[str, Any], distributed: bool, decoupled_lr: float | None = None
) -> dict[str, float]:
    """Return the largest first step of all A and of all B, where every gradient is one.

    With a decoupled rate, that of the unembedding's are named by themselves.

    Adam's first step is then lr / (1 + eps).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import training

    from benchmarks.regret.model import build, start_megatron
    from megalora import apply_lora
    from megalora.training import patches

    start_megatron()
    model, lora = build("dense"), LoRAConfig(rank=4, **changes)
    apply_lora([model], lora)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    chunk = DistributedDataParallel(model.config, ddp_config, model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=0.0,
        weight_decay=0.0,
        clip_grad=0.0,
        adam_eps=1e-8,
        decoupled_lr=decoupled_lr,
        use_distributed_optimizer=distributed,
    )
    patches.install(patches.TRAINING)
    optimizer = training.get_megatron_optimizer(config, [chunk])
    _constant(OptimizerParamScheduler, optimizer).step(1)
    factors = {name: p for name, p in chunk.named_parameters() if p.requires_grad}
    before = [p.detach().clone() for p in factors.values()]
    for factor in factors.values():
        factor.main_grad.fill_(1.0)  # type: ignore[attr-defined]
    chunk.finish_grad_sync()
    optimizer.step()
    steps: dict[str, float] = {}
    for (whole, factor), old in zip(factors.items(), before, strict=True):
        name = factor.lora_factor  # type: ignore[attr-defined]
        if decoupled_lr is not None and "output_layer" in whole:
            name = f"output {name}"
        steps[name] = max(steps.get(name, 0.0), (factor - old).abs().max().item())
    return steps


def _constant(scheduler: Any, optimizer: Any) -> Any:
    """Return Megatron's scheduler, which writes the rates of all groups anew at each step."""
    decay = {"start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 9, "wd_incr_style": "constant"}
    rates = {"init_lr": 0.0, "max_lr": LR, "min_lr": 0.0, "lr_warmup_steps": 0}
    return scheduler(optimizer, **rates, lr_decay_steps=9, lr_decay_style="constant", **decay)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"lora_A": LR, "lora_B": LR}),
        ({"lr_ratio": 4.0}, {"lora_A": LR, "lora_B": 4 * LR}),
        ({"eps_a": 1.0}, {"lora_A": LR / 2, "lora_B": LR}),
        ({"eps_a": 3.0, "eps_b": 1.0, "lr_ratio": 4.0}, {"lora_A": LR / 4, "lora_B": 2 * LR}),
    ],
    ids=["plain", "ratio", "eps-a", "all"],
)
def test_each_factor_steps_by_its_own_rate_and_epsilon(
    changes: dict[str, Any], expected: dict[str, float], distributed: bool
) -> None:
    steps = call(first_updates, changes, distributed)
    assert steps == pytest.approx(expected, rel=1e-3)


def test_the_decoupled_rate_is_that_of_the_unembedding() -> None:
    steps = call(first_updates, {"lr_ratio": 4.0}, False, 5 * LR)
    layers = {"lora_A": LR, "lora_B": 4 * LR}
    output = {"output lora_A": 5 * LR, "output lora_B": 20 * LR}
    assert steps == pytest.approx({**layers, **output}, rel=1e-3)
