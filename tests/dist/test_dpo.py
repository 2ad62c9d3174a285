"""Preference optimization in parallel layouts takes the steps of one rank."""

import argparse
import functools

import pytest
import torch
from megatron.core import parallel_state

from examples.dpo_lora import batches, evaluate
from megalora.data.preferences import Pair, gather_pairs
from megalora.data.tokenizers import Tokens
from megalora.losses import dpo_loss, dpo_metrics
from tests.dist.support.cases import CP2, DP2, PP2, TP2_SP
from tests.dist.support.dpo import BETA, Steps, take_steps
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.test_policy import attached, policy_of

KIND, NUM_STEPS = "dense", 2


def pairs() -> list[Pair]:
    """Return 4 pairs of unequal lengths; of one the answers' tokens are apart, as tools leave them.

    Lengths are uneven, so that the parts of ranks differ.
    """
    generator = torch.Generator().manual_seed(0)

    def answer(prompt: list[int], length: int) -> Tokens:
        ids = [*prompt, *torch.randint(64, (length,), generator=generator).tolist()]
        trained = [place >= len(prompt) for place in range(len(ids))]
        if length > 6:
            trained[len(prompt) + 2 : len(prompt) + 4] = [False, False]
        return Tokens(ids, trained)

    found = []
    for prompt, chosen, rejected in ((1, 3, 5), (4, 7, 2), (2, 1, 9), (3, 4, 4)):
        shared = torch.randint(64, (prompt,), generator=generator).tolist()
        found.append(Pair(answer(shared, chosen), answer(shared, rejected)))
    return found


@functools.cache
def truth(world_size: int) -> Steps:
    """Return the steps of one rank, all pairs in one microbatch."""
    alone = one_rank(Layout(dp=world_size))
    with model_parallel(alone):
        return take_steps(alone, attached(alone, KIND), pairs(), num_steps=NUM_STEPS, size=4)


def check_steps(layout: Layout, *, overlap: bool = False) -> None:
    expected = truth(layout.world_size)
    with model_parallel(layout):
        chunks = attached(layout, KIND)
        own = pairs()[parallel_state.get_data_parallel_rank() :: layout.dp]
        found = take_steps(layout, chunks, own, num_steps=NUM_STEPS, size=1, overlap=overlap)
    for own, other in zip(found.metrics, expected.metrics, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert expected.metrics[-1]["loss"] < expected.metrics[0]["loss"]
    assert overlap or found.gradients.keys() == expected.gradients.keys()
    for name, value in found.gradients.items():
        torch.testing.assert_close(value, expected.gradients[name], rtol=1e-4, atol=1e-5)
    for name, value in expected.end.items():
        torch.testing.assert_close(found.end[name], value, rtol=0, atol=2e-5)


@over(TP2_SP, PP2, CP2, DP2)
def test_a_layout_takes_the_steps_of_one_rank(layout: Layout) -> None:
    check_steps(layout)


@over(DP2)
def test_parameters_that_are_gathered_late_are_new_after_the_step(layout: Layout) -> None:
    check_steps(layout, overlap=True)


@over(Layout(), DP2, PP2)
def test_held_out_pairs_are_counted_once_whatever_fills_up_their_batches(layout: Layout) -> None:
    five = [*pairs(), pairs()[1]._replace(rejected=pairs()[1].rejected._replace(ids=[5] * 6))]
    held_out = gather_pairs(five, "five", 64)
    args = argparse.Namespace(
        global_batch_size=4, micro_batch_size=1, eval_iters=2, beta=BETA, label_smoothing=0.0
    )
    with model_parallel(layout):
        policy = policy_of(layout, attached(layout, KIND))
        found = evaluate(policy, held_out, args)
        (whole,) = batches(policy, five, len(five))
        four = whole.four(*policy.logprobs([whole.sequences]))
        args.eval_iters = 1
        first = evaluate(policy, held_out, args)
    sums = {"loss": dpo_loss(*four, beta=BETA), **dpo_metrics(*four, beta=BETA)}
    assert found == pytest.approx(
        {name: float(total) / 5 for name, total in sums.items()}, rel=1e-4
    )
    of_four = dpo_loss(*(x[:4] for x in four), beta=BETA)
    assert first["loss"] == pytest.approx(float(of_four) / 4, rel=1e-4)
    assert found["loss"] != pytest.approx(first["loss"], rel=1e-3)
