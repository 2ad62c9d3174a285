"""The reinforcement learning loss against what the article writes down."""

import pytest
import torch

from megalora.losses import group_advantages, policy_gradient_loss


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
