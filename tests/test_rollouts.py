"""What rollouts by Megatron need beside Megatron: numbers, drawing, the gap to the learner."""

import random
from types import SimpleNamespace

import pytest
import torch

from megalora.rollouts.batch import in_batches
from megalora.rollouts.drawing import draw, uniforms
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.gap import Gap, gap
from megalora.rollouts.supported import REQUIRED, check_supported


def test_each_prompt_has_numbers_of_its_own_that_no_other_changes() -> None:
    state = torch.get_rng_state(), random.getstate()
    numbers = uniforms(7, 0, [0, 1, 2], 5)
    assert torch.equal(uniforms(7, 0, [2, 0], 5), numbers[[2, 0]])
    assert torch.equal(uniforms(7, 0, [1], 3), numbers[1:2, :3])
    others = [uniforms(8, 0, [0], 5), uniforms(7, 1, [0], 5), numbers[1:2]]
    assert not any((other == numbers[0]).any() for other in others)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_drawn_by_inversion_with_log_probabilities_in_fp32(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])
    logits = probabilities.log().nan_to_num(neginf=torch.finfo(dtype).min).to(dtype)
    numbers = [0.0, 0.2, 0.3, 0.7, 0.8, 1 - 2**-53]
    tokens, logprobs = draw(
        logits.expand(len(numbers), -1), torch.tensor(numbers, dtype=torch.float64)
    )
    # The last row is a padding of the vocabulary: no number reaches it.
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    expected = logits.float().log_softmax(-1)[tokens]
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, expected)


def test_batches_are_of_prompts_of_like_lengths() -> None:
    lengths = [5, 1, 9, 5, 2, 30, 5]
    by_size = in_batches(lengths, max_batch_size=3, max_spread=None)
    assert list(by_size) == [[1, 4, 0], [3, 6, 2], [5]]
    by_length = in_batches(lengths, max_batch_size=4, max_spread=4)
    assert list(by_length) == [[1, 4, 0, 3], [6, 2], [5]]
    assert list(in_batches([1, 6], max_batch_size=4, max_spread=4)) == [[0], [1]]
    assert list(in_batches([], max_batch_size=4, max_spread=4)) == []


def test_the_gap_is_measured_over_all_tokens() -> None:
    answers = [Answer([1, 2], [-1.0, -2.0], True), Answer([3], [-0.5], False)]
    found = gap([torch.tensor([-1.5, -2.0]), [-0.25]], answers)
    ratios = torch.tensor([-0.5, 0.0, 0.25], dtype=torch.float64)
    assert found.mean == pytest.approx(0.25)
    assert found.largest == pytest.approx(0.5)
    assert found.kl == pytest.approx(float((ratios.exp() - 1 - ratios).mean()))
    assert gap([[]], [Answer([], [], False)]) == Gap(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"learner_logprobs have \[1, 1\] tokens .* \[2, 1\]"):
        gap([[-1.0], [-1.0]], answers)


def test_its_mean_is_the_divergence_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler, learner = torch.randn(2, 8, generator=generator).log_softmax(-1)
    tokens = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator)
    answers = [Answer(tokens.tolist(), sampler[tokens].tolist(), True)]
    found = gap([learner[tokens]], answers)
    divergence = float((sampler.exp() * (sampler - learner)).sum())
    assert found.kl == pytest.approx(divergence, rel=0.02)


def config(**fields: object) -> SimpleNamespace:
    """Return a configuration that can be rolled out, but for fields."""
    usual = {field: value for field, value, _ in REQUIRED}
    return SimpleNamespace(
        **{**usual, "multi_latent_attention": False, "apply_rope_fusion": True, **fields}
    )


def check(model: SimpleNamespace, *, positions: str = "rope", pattern: str = "") -> None:
    """Check a configuration of one chunk."""
    check_supported(
        model, num_chunks=1, position_embedding_type=positions, hybrid_layer_pattern=pattern
    )


@pytest.mark.parametrize("field", [field for field, _, _ in REQUIRED])
def test_what_megatron_cannot_decode_is_refused_by_its_flag(field: str) -> None:
    check(config())
    with pytest.raises(ValueError, match=f"{field} is 2: rollouts by Megatron cannot have it, .*"):
        check(config(**{field: 2}))


def test_positions_and_layers_that_it_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="set --no-rope-fusion"):
        check(config(multi_latent_attention=True))
    with pytest.raises(ValueError, match="position_embedding_type is mrope"):
        check(config(), positions="mrope")
    with pytest.raises(ValueError, match=r"hybrid_layer_pattern is 'M\*\|GE', with layers G M"):
        check(config(), pattern="M*|GE")
    check(config(), pattern="*-|+E/*-")


def test_an_answer_of_no_token_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        Sampling(max_tokens=0)
