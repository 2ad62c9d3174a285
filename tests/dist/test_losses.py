"""Losses of a split vocabulary or sequence are those of the whole, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megalora.data.batch import chunk_positions
from megalora.losses import (
    dpo_loss,
    kl_loss,
    policy_gradient_loss,
    sequence_logprobs,
    vocab_parallel_logprobs,
)
from tests.dist.support.layouts import Layout, model_parallel, over

S, B, V = 5, 3, 16
CP2, TP2_CP2 = Layout(cp=2), Layout(tp=2, cp=2)


def whole() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [s, b, v], tokens [s, b] and the gradient of the log probabilities [s, b]."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(S, B, V, generator=generator)
    tokens = torch.randint(0, V, (S, B), generator=generator)
    return logits, tokens, torch.randn(S, B, generator=generator)


@over(Layout(), Layout(tp=2), Layout(tp=4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_log_softmax_of_the_whole_vocabulary(
    layout: Layout, dtype: torch.dtype
) -> None:
    logits, tokens, upstream = whole()
    full = logits.to(dtype).float().clone().requires_grad_()
    expected = full.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    expected.backward(upstream)
    assert full.grad is not None
    with model_parallel(layout):
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        shard = logits.to(dtype).chunk(layout.tp, -1)[tp_rank].clone().requires_grad_()
        logprobs = vocab_parallel_logprobs(shard, tokens)
    logprobs.backward(upstream)
    torch.testing.assert_close(logprobs, expected.detach())
    expected_grad = full.grad.chunk(layout.tp, -1)[tp_rank].to(dtype)
    torch.testing.assert_close(shard.grad, expected_grad)


@over(Layout(tp=2))
def test_the_callers_logits_are_left_alone(layout: Layout) -> None:
    logits, tokens, _ = whole()
    with model_parallel(layout):
        shard = logits.chunk(2, -1)[parallel_state.get_tensor_model_parallel_rank()].contiguous()
        before = shard.clone()
        vocab_parallel_logprobs(shard, tokens)
    torch.testing.assert_close(shard, before, rtol=0, atol=0)


# === Over context-parallel ranks ===


class Split:
    """Whole logits [s, b, v] and what goes with them, and the part of a rank of them."""

    def __init__(self, layout: Layout) -> None:
        generator = torch.Generator().manual_seed(1)
        self.layout = layout
        self.logits = 3 * torch.randn(8, 4, V, generator=generator)
        self.tokens = torch.randint(0, V, (8, 4), generator=generator)
        self.mask = torch.rand(8, 4, generator=generator) < 0.6
        self.sampler, self.reference = -3 * torch.rand(2, 8, 4, generator=generator)
        self.advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
        rank = parallel_state.get_context_parallel_rank()
        self.own = chunk_positions(torch.tensor([0, 8]), layout.cp, rank)

    def of_rank(self, loss: Callable[..., Tensor], cp_group: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of this rank's part, and its gradient."""
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        part = self.logits[self.own].chunk(self.layout.tp, -1)[tp_rank].clone().requires_grad_()
        logprobs = vocab_parallel_logprobs(part, self.tokens[self.own])
        rest = (x[self.own] for x in (self.sampler, self.reference, self.mask))
        value = loss(logprobs, *rest, self.advantages, cp_group)
        return value.detach(), torch.autograd.grad(value, part)[0]

    def of_all(self, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss of the whole, and the part of its gradient that is this rank's."""
        full = self.logits.clone().requires_grad_()
        logprobs = full.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        value = loss(logprobs, self.sampler, self.reference, self.mask, self.advantages, None)
        (grad,) = torch.autograd.grad(value, full)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        return value.detach(), grad[self.own].chunk(self.layout.tp, -1)[tp_rank]


def of_tokens(
    logprobs: Tensor, sampler: Tensor, reference: Tensor, mask: Tensor, advantages: Tensor, _: Any
) -> Tensor:
    """Return a loss to which each token adds its own."""
    loss = policy_gradient_loss(logprobs, sampler, advantages, mask, clip_low=0.2, clip_high=0.3)
    return loss + 0.5 * kl_loss(logprobs, reference, mask, sampler_logprobs=sampler)


def of_answers(
    logprobs: Tensor, _: Tensor, reference: Tensor, mask: Tensor, __: Tensor, cp_group: Any
) -> Tensor:
    """Return a loss of whole answers: two pairs."""
    own, base = (sequence_logprobs(x, mask, cp_group=cp_group) for x in (logprobs, reference))
    return dpo_loss(*own.chunk(2), *base.chunk(2), beta=0.7, label_smoothing=0.1)


@over(Layout(), CP2, TP2_CP2)
def test_the_losses_of_context_parallel_ranks_add_up_to_that_of_one(layout: Layout) -> None:
    with model_parallel(layout):
        group: Any = parallel_state.get_context_parallel_group()
        split = Split(layout)
        loss, grad = split.of_rank(of_tokens, group)
        expected, expected_grad = split.of_all(of_tokens)
        dist.all_reduce(loss, group=group)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@over(Layout(), CP2, TP2_CP2)
def test_whole_answers_are_summed_over_context_parallel_ranks(layout: Layout) -> None:
    with model_parallel(layout):
        split = Split(layout)
        loss, grad = split.of_rank(of_answers, parallel_state.get_context_parallel_group())
        expected, expected_grad = split.of_all(of_answers)
    # Each rank has the whole loss, and of the gradient its own tokens' part.
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
