"""Rollouts on the training model: Megatron's cached inference, with the adapters active.

The oracle is a forward pass of the whole text without a cache, on one rank.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode

from megalora.builder import apply_lora, set_enabled
from megalora.checkpoint.gather import load_adapters
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.megatron import MegatronEngine
from tests.dist.support.cases import ALLGATHER, EP2, ETP2, KINDS, PP2, RECOMPUTED, TP2, TP2_EP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over, world
from tests.dist.support.models import VOCAB_SIZE, build_model
from tests.dist.support.parity import lora_config, start_values
from tests.dist.support.training import Run, Trainer

ONE, DP2 = Layout(), Layout(dp=2)
PROMPTS = [[5, 9, 60], [7], [1, 2, 3, 4, 5], [7], [33, 8, 61, 2], [9, 9, 9]]
SAMPLING = Sampling(max_tokens=6, stop=(3, 17, 40, 41), seed=11)
PADDED = "padded vocabulary"
CASES = [
    *(
        (ONE, kind)
        for kind in (
            *("dense", "tied embeddings", PADDED, "latent attention", "multi-token prediction"),
            *("ungated with biases", "experts", "GLM-4.5's layers"),
        )
    ),
    *((TP2, kind) for kind in ("dense", "latent attention", "experts")),
    *(
        (TP2_SP, kind)
        for kind in ("dense", "tied embeddings", PADDED, "latent attention", "shared experts")
    ),
    *((PP2, kind) for kind in ("dense", "tied embeddings", "multi-token prediction")),
    (DP2, "dense"),
    *((layout, "shared experts") for layout in (EP2, ETP2, TP2_EP2)),
    (EP2, "GLM-4.5's layers"),
    (Layout(tp=2, sp=True, pp=2), "dense"),
    (Layout(pp=2, dp=2, ep=2), "experts in 4 layers"),
    (Layout(tp=2, sp=True, dp=2, ep=4), "experts"),
    (Layout(tp=2, sp=True, dp=2, ep=2, etp=2), "experts"),
]
EVERYWHERE = pytest.mark.parametrize(
    ("layout", "kind"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=world(case[0])) for case in CASES],
)


def prompts_of(dp_rank: int) -> list[list[int]]:
    """Return a data-parallel rank's prompts, longer than those of the rank before."""
    return [[(token + 7 * dp_rank) % 60 for token in prompt] + [1] * dp_rank for prompt in PROMPTS]


def adapted(layout: Layout, kind: str, **fields: Any) -> list[Any]:
    """Build a model whose adapters have a B that is not zero, the same numbers in all layouts."""
    rows = {"vocab_size": VOCAB_SIZE} if kind == PADDED else {}
    model = build_model(layout, **{**KINDS[kind].model, **fields})
    chunks = apply_lora(model, lora_config(kind), **rows)
    load_adapters(chunks, start_values(chunks))
    return chunks


def forward_logprobs(chunk: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the log probabilities of an answer by a forward pass of all of it, [answer, v]."""
    text = torch.tensor([prompt + tokens])
    positions = torch.arange(text.shape[1])[None]
    with torch.no_grad():
        logits = chunk(text, positions, None, runtime_gather_output=True)
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


@dataclasses.dataclass(frozen=True)
class Rank:
    """What a rank of the world has sampled."""

    dp_rank: int
    answers: list[Answer]


def rollout(layout: Layout, kind: str, **fields: Any) -> list[Rank]:
    """Return the answers of each rank of the world."""
    with model_parallel(layout):
        chunks = adapted(layout, kind, **fields)
        dp_rank = parallel_state.get_data_parallel_rank()
        own = MegatronEngine(chunks, max_batch_size=4).generate(prompts_of(dp_rank), SAMPLING)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, Rank(dp_rank, own))
    return ranks


@functools.cache
def truth(world_size: int, kind: str, enabled: bool = True) -> dict[int, list[Answer]]:
    """Return what a rank alone answers as each data-parallel rank, as checked without a cache."""
    one = Layout(dp=world_size)
    ranks = rollout(one, kind)
    with model_parallel(one):
        (chunk,) = adapted(one, kind)
        chunk.eval()
        prompts = prompts_of(dist.get_rank())
        for prompt, answer in zip(prompts, ranks[dist.get_rank()].answers, strict=True):
            tokens = torch.tensor(answer.tokens)[:, None]
            expected = forward_logprobs(chunk, prompt, answer.tokens).gather(-1, tokens)[:, 0]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    return {rank.dp_rank: rank.answers for rank in ranks}


def check(ranks: list[Rank], expected: dict[int, list[Answer]]) -> None:
    """Compare all ranks' answers, and their log probabilities, with those of one rank."""
    for rank in ranks:
        for own, one in zip(rank.answers, expected[rank.dp_rank], strict=True):
            assert (own.tokens, own.ended) == (one.tokens, one.ended)
            assert own.logprobs == pytest.approx(one.logprobs, abs=1e-5)


@EVERYWHERE
def test_answers_are_those_of_a_model_without_a_cache(layout: Layout, kind: str) -> None:
    check(rollout(layout, kind), truth(layout.world_size, kind))
