"""Learning rates, capacity and the two-number basis, against the article."""

import dataclasses
from typing import Any

import pytest

from megalora.model.presets import preset_shape
from megalora.recommend import (
    learning_rates,
    recommend,
)
from megalora.recommend.rules import two_number_basis
from tests.support.sizes import LLAMA, MOE, lora, trainable


@pytest.mark.parametrize(
    ("preset", "rate"),
    [
        ("llama-3.2-1b", 4.91e-4),
        ("llama-3.1-8b", 2.86e-4),
        ("llama-3.1-70b", 1.66e-4),
        ("qwen3-8b", 4.73e-4),
        ("qwen3-30b-a3b", 4.99e-4),
    ],
)
def test_rates_are_the_articles(preset: str, rate: float) -> None:
    result = recommend(preset_shape(preset), lora(8))
    assert result.learning_rate == pytest.approx(rate, rel=2e-3)
    assert result.rates.full[0] == pytest.approx(result.learning_rate / 10)


def test_runs_of_fewer_than_a_hundred_steps_get_fifteen_times() -> None:
    short, long = (learning_rates(4096, "llama", steps=steps) for steps in (99, 100))
    assert short.lora[0] == pytest.approx(1.5 * long.lora[0])
    assert short.full == long.full


def test_the_rate_does_not_depend_on_the_rank() -> None:
    assert recommend(LLAMA, lora(4)).learning_rate == recommend(LLAMA, lora(512)).learning_rate


def test_an_unknown_family_gets_a_range_and_is_told_so() -> None:
    unknown = dataclasses.replace(LLAMA, family="mistral")
    result = recommend(unknown, lora(8))
    low, high = result.rates.lora
    assert (low, high) == pytest.approx((2.86e-4, 4.73e-4), rel=2e-3)
    assert result.basis is None
    assert any("not to mistral" in note for note in result.notes)
    assert "constant (10 x, family mistral, to which it was not fitted)" in result.table()
    with pytest.raises(ValueError, match=r"mistral.*sweep"):
        _ = result.learning_rate


def test_two_bits_for_each_parameter_bound_the_tokens() -> None:
    bits = 2 * trainable(LLAMA, lora(8))
    fits = recommend(LLAMA, lora(8), tokens=bits).capacity
    too_much = recommend(LLAMA, lora(8), tokens=bits + 1).capacity
    assert fits is not None
    assert too_much is not None
    assert (fits.low_regret, fits.rank_needed) == (True, 8)
    assert (too_much.low_regret, too_much.rank_needed) == (False, 16)


def test_the_first_epochs_loss_is_a_bound_in_nats() -> None:
    capacity = recommend(LLAMA, lora(8), first_epoch_nats=1000.0).capacity
    assert capacity is not None
    assert capacity.data_bits == pytest.approx(1442.695)


def test_reinforcement_learning_needs_the_smallest_rank() -> None:
    dense, experts = (recommend(s, lora(32), rl_episodes=10**6).capacity for s in (LLAMA, MOE))
    assert dense is not None
    assert experts is not None
    assert dense.rank_needed == 1
    assert experts.rank_needed == 8, "per-expert ranks need a multiple of top-k"


def test_data_beyond_any_rank_calls_for_full_fine_tuning() -> None:
    result = recommend(LLAMA, lora(8), tokens=10**12)
    assert result.capacity is not None
    assert result.capacity.rank_needed is None
    assert any("full fine-tuning" in note for note in result.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"rl_episodes": 5, "tokens": 5}, "one by one"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_impossible_runs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommend(LLAMA, lora(8), **fields)


def test_large_batches_are_warned_of_in_supervised_training_only() -> None:
    def warned(**fields: Any) -> bool:
        return any("batch size" in note for note in recommend(LLAMA, lora(8), **fields).notes)

    assert warned(batch_size=33)
    assert not warned(batch_size=32)
    assert not warned(batch_size=256, rl_episodes=1000)


def test_the_basis_does_not_move_along_the_articles_invariance() -> None:
    q = 4.0
    plain = two_number_basis(lora(8, alpha=32), 2048, 1e-4)
    moved = two_number_basis(lora(8, alpha=32 / q, lr_ratio=q), 2048, 1e-4)
    control = two_number_basis(lora(8, alpha=32 / q), 2048, 1e-4)
    assert moved == pytest.approx(plain, rel=1e-12)
    assert control != pytest.approx(plain, rel=0.1)


def test_another_alpha_comes_with_the_ratio_that_trains_alike() -> None:
    notes = recommend(LLAMA, lora(8, alpha=64)).notes
    assert any("--lora-lr-ratio 0.5" in note for note in notes)
    assert not any("ratio" in n for n in recommend(LLAMA, lora(8, alpha=64, lr_ratio=0.5)).notes)


def test_rslora_counts_as_a_larger_alpha() -> None:
    notes = recommend(LLAMA, lora(16, rslora=True)).notes
    assert any("alpha is 128" in note for note in notes)
