"""The losses against what their sources write down."""

import math

import pytest
import torch

from megalora.losses import (
    dpo_loss,
    dpo_metrics,
    group_advantages,
    kl_loss,
    num_clipped,
    policy_gradient_loss,
    sequence_logprobs,
)


def sampled(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return arguments of the loss for 5 positions of 3 episodes, some masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 0, 1]])
    return {
        "learner_logprobs": (-normal(5, 3).abs()).requires_grad_(),
        "sampler_logprobs": -normal(5, 3).abs(),
        "advantages": normal(3),
        "mask": mask,
    }


def test_advantages_are_rewards_less_their_groups_mean() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 7.0])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, -1.0, 1.0])
    torch.testing.assert_close(group_advantages(rewards, 2), expected)


def test_advantages_are_not_divided_by_the_standard_deviation() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 10.0])
    torch.testing.assert_close(
        10 * group_advantages(rewards[:2], 2), group_advantages(rewards[2:], 2)
    )


def test_equal_rewards_teach_nothing() -> None:
    assert not group_advantages(torch.full((4,), 3.0), 4).any()


@pytest.mark.parametrize(
    ("shape", "group_size", "message"),
    [((4,), 1, "at least 2"), ((5,), 2, "whole groups of 2"), ((2, 2), 2, "one reward for each")],
)
def test_rewards_that_are_not_groups_are_refused(
    shape: tuple[int, ...], group_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(shape), group_size)


def test_the_loss_is_the_sum_of_ratio_times_advantage() -> None:
    batch = sampled()
    expected = 0.0
    for t in range(5):
        for episode in range(3):
            if batch["mask"][t, episode]:
                ratio = torch.exp(
                    batch["learner_logprobs"][t, episode] - batch["sampler_logprobs"][t, episode]
                )
                expected -= (ratio * batch["advantages"][episode]).item()
    assert policy_gradient_loss(**batch).item() == pytest.approx(expected, rel=1e-12)


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    batch = sampled()
    batch["sampler_logprobs"] = batch["learner_logprobs"].detach().clone()
    policy_gradient_loss(**batch).backward()
    # d/d log p of -(p / p) Adv is -Adv, which REINFORCE has.
    expected = -(batch["mask"] * batch["advantages"])
    torch.testing.assert_close(batch["learner_logprobs"].grad, expected.double())


def test_a_ratio_far_from_one_is_not_clipped() -> None:
    batch = sampled()
    batch["sampler_logprobs"] = batch["learner_logprobs"].detach() - 3.0
    policy_gradient_loss(**batch).backward()
    expected = -(batch["mask"] * batch["advantages"]) * torch.tensor(3.0).double().exp()
    torch.testing.assert_close(batch["learner_logprobs"].grad, expected)


def test_the_sampler_gets_no_gradient() -> None:
    batch = sampled()
    batch["sampler_logprobs"].requires_grad_()
    policy_gradient_loss(**batch).backward()
    assert batch["sampler_logprobs"].grad is None


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan"), 1e4])
def test_masked_positions_may_hold_anything(garbage: float) -> None:
    batch = sampled()
    clean = policy_gradient_loss(**batch)
    (expected,) = torch.autograd.grad(clean, batch["learner_logprobs"])
    batch["sampler_logprobs"] = batch["sampler_logprobs"].masked_fill(batch["mask"] == 0, garbage)
    loss = policy_gradient_loss(**batch)
    (grad,) = torch.autograd.grad(loss, batch["learner_logprobs"])
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(grad, expected)


# === The clipped ratio ===


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.4), (None, 0.3), (0.3, None), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_clipped_loss_is_the_smaller_of_both_objectives(
    clip: tuple[float | None, float | None], dtype: torch.dtype
) -> None:
    batch = {k: v.to(dtype) if k != "mask" else v for k, v in sampled(2).items()}
    batch["learner_logprobs"] = batch["learner_logprobs"].detach().requires_grad_()
    low, high = clip
    ratio = (batch["learner_logprobs"].double() - batch["sampler_logprobs"].double()).exp()
    bounded = ratio.clamp(
        0.0 if low is None else 1 - low, float("inf") if high is None else 1 + high
    )
    gain = torch.minimum(ratio * batch["advantages"], bounded * batch["advantages"])
    expected = -(gain * batch["mask"]).sum()
    (expected_grad,) = torch.autograd.grad(expected, batch["learner_logprobs"])
    loss = policy_gradient_loss(**batch, clip_low=low, clip_high=high)
    (grad,) = torch.autograd.grad(loss, batch["learner_logprobs"])
    torch.testing.assert_close(loss, expected.to(dtype))
    torch.testing.assert_close(grad, expected_grad)
    stuck = (batch["mask"] != 0) & (grad == 0)
    assert 0 < stuck.sum() < batch["mask"].sum()
    assert num_clipped(**batch, clip_low=low, clip_high=high) == stuck.sum()


def test_nothing_is_clipped_by_default() -> None:
    assert num_clipped(**sampled()) == 0


def test_a_ratio_that_no_number_holds_is_clipped_without_a_trace() -> None:
    batch = sampled()
    batch["sampler_logprobs"] = batch["learner_logprobs"].detach() - 1e4
    batch["advantages"] = batch["advantages"].abs()
    policy_gradient_loss(**batch, clip_low=0.2, clip_high=0.2).backward()
    assert not batch["learner_logprobs"].grad.any()


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"clip_low": 1.0}, "clip_low is 1.0: it must be at least 0 and below 1"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_high": -0.1}, "clip_high is -0.1: it must be at least 0"),
        ({"clip_high": float("nan")}, "clip_high is nan"),
    ],
)
def test_bounds_that_leave_no_ratio_are_refused(clip: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_gradient_loss(**sampled(), **clip)


# === The divergence from a reference ===


def test_the_divergence_of_one_token_is_k3() -> None:
    learner = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5], [-0.5]], dtype=torch.float64)
    loss = kl_loss(learner, reference, torch.ones(2, 1))
    # d = -0.5 and 1.5: exp(d) - d - 1, and its derivative 1 - exp(d).
    d = reference - learner.detach()
    torch.testing.assert_close(loss, (d.exp() - d - 1).sum())
    loss.backward()
    torch.testing.assert_close(learner.grad, 1 - d.exp())


def test_the_divergence_is_that_of_the_distributions_where_the_learner_samples() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learner, reference = logits.log_softmax(-1)
    # Weighted by the learner's probabilities, as many samples would be.
    each = torch.stack(
        [
            kl_loss(learner[k].view(1, 1), reference[k].view(1, 1), torch.ones(1, 1))
            for k in range(9)
        ]
    )
    expected = (learner.exp() * (learner - reference)).sum()
    torch.testing.assert_close((learner.exp() * each).sum(), expected)


@pytest.mark.parametrize("samples", ["learner", "another"])
def test_weighted_by_the_ratio_value_and_gradient_are_the_divergences(samples: str) -> None:
    draw = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = draw[0].clone().requires_grad_()
    learner, (reference, other) = logits.log_softmax(-1), draw[1:].log_softmax(-1)
    (expected,) = torch.autograd.grad((learner.exp() * (learner - reference)).sum(), logits)
    learner = logits.log_softmax(-1)
    sampler = learner.detach() if samples == "learner" else other
    total = torch.zeros((), dtype=torch.float64)
    for k in range(9):  # every token, as often as it is sampled
        one, ref, own = (x[k].view(1, 1) for x in (learner, reference, sampler))
        term = kl_loss(one, ref, torch.ones(1, 1), sampler_logprobs=own)
        total = total + sampler[k].exp() * term
    torch.testing.assert_close(total, (learner.exp() * (learner - reference)).sum())
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected)


def test_small_divergences_are_not_lost_in_half_the_digits() -> None:
    learner = torch.full((1, 1), -1.0)
    assert kl_loss(learner, learner + 1e-3, torch.ones(1, 1)).item() == pytest.approx(
        5e-7, rel=0.05
    )


def test_the_reference_gets_no_gradient() -> None:
    batch = sampled()
    reference = batch["sampler_logprobs"].requires_grad_()
    kl_loss(batch["learner_logprobs"], reference, batch["mask"]).backward()
    assert reference.grad is None


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan"), -1e4])
@pytest.mark.parametrize("where", ["learner_logprobs", "sampler_logprobs"])
def test_masked_positions_have_no_divergence(garbage: float, where: str) -> None:
    batch = sampled()
    learner = batch["learner_logprobs"]
    clean = kl_loss(learner, batch["sampler_logprobs"], batch["mask"])
    (expected,) = torch.autograd.grad(clean, learner)
    batch[where] = batch[where].masked_fill(batch["mask"] == 0, garbage)
    loss = kl_loss(batch["learner_logprobs"], batch["sampler_logprobs"], batch["mask"])
    (grad,) = torch.autograd.grad(loss, learner)
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(grad, expected)


# === Whole answers and preferences ===


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), float("nan")])
def test_an_answers_logprob_is_the_sum_over_its_tokens(garbage: float) -> None:
    batch = sampled()
    filled = batch["learner_logprobs"].masked_fill(batch["mask"] == 0, garbage)
    sums = sequence_logprobs(filled, batch["mask"])
    torch.testing.assert_close(sums, (batch["learner_logprobs"] * batch["mask"]).sum(0))
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((sums * weights).sum(), batch["learner_logprobs"])
    torch.testing.assert_close(grad, batch["mask"] * weights)


def pairs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return chosen, rejected and the reference's of 4 pairs, the first two with gradient."""
    values = -5 * torch.rand(4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return [row.clone().requires_grad_(number < 2) for number, row in enumerate(values)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dpo_is_the_logistic_loss_of_the_margin(smoothing: float, dtype: torch.dtype) -> None:
    four = pairs(dtype)
    loss = dpo_loss(*four, beta=0.7, label_smoothing=smoothing)
    grads = torch.autograd.grad(loss, four[:2])
    expected, slopes = 0.0, []
    for chosen, rejected, ref_chosen, ref_rejected in zip(
        *(x.double().tolist() for x in four), strict=True
    ):
        margin = 0.7 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        expected += math.log(1 + math.exp(-margin)) + smoothing * margin
        slopes.append(0.7 * (smoothing - 1 / (1 + math.exp(margin))))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    slope = torch.tensor(slopes, dtype=dtype)
    torch.testing.assert_close(grads[0], slope)
    torch.testing.assert_close(grads[1], -slope)


def test_dpo_of_margins_that_no_exponential_holds_is_finite() -> None:
    chosen = torch.tensor([-2000.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, -2000.0])
    loss = dpo_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=1.0)
    loss.backward()
    assert loss.item() == 2000.0
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_the_policy_that_is_its_reference_has_no_reward() -> None:
    chosen, rejected, *_ = pairs()
    same = chosen, rejected, chosen.detach(), rejected.detach()
    assert dpo_loss(*same, beta=0.1).item() == pytest.approx(4 * math.log(2))
    assert not any(value.item() for value in dpo_metrics(*same, beta=0.1).values())


def test_the_metrics_are_the_rewards_of_both_answers() -> None:
    found = dpo_metrics(*pairs(), beta=0.7)
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in pairs())
    reward, other = 0.7 * (chosen - ref_chosen), 0.7 * (rejected - ref_rejected)
    assert found["rewards/chosen"] == reward.sum()
    assert found["rewards/rejected"] == other.sum()
    torch.testing.assert_close(found["rewards/margins"], (reward - other).sum())
    assert found["rewards/accuracies"] == (reward > other).sum() == 3
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0: it must be above 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"beta": 0.1, "label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ],
)
def test_preferences_that_teach_nothing_are_refused(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(*pairs(), **options)
