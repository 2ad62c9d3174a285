"""Log probabilities of a split vocabulary are those of the whole one, gradients included."""

import pytest
import torch
from megatron.core import parallel_state

from megalora.losses import vocab_parallel_logprobs
from tests.dist.support.layouts import Layout, model_parallel, over

S, B, V = 5, 3, 16


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
