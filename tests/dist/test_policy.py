"""A policy's log probabilities and steps are those of the unsharded model, in every layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import load_adapters
from megalora.policy.policy import Policy
from megalora.policy.sequences import Sequences
from tests.dist.support.cases import CP2, DP2, EP2, KINDS, PP2, TP2, TP2_EP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, one_rank
from tests.dist.support.models import build_model
from tests.dist.support.parity import assemble, lora_config, start_values
from tests.dist.support.training import Run, Trainer

LR, EPS, CLIP, STEPS = 1e-2, 1e-3, 1.0, 2
MICROBATCHES, ROWS, REPLICAS = 2, 3, 2
VPP2 = Layout(pp=2, vpp=2)


@dataclasses.dataclass(frozen=True)
class Part:
    """A microbatch with a weight of each answer [b], and log probabilities of long ago [b, s]."""

    sequences: Sequences
    weights: Tensor
    before: Tensor


def part(seed: int) -> Part:
    """Draw prompts and answers of unequal lengths; one answer has no token."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int) -> list[list[int]]:
        lengths = torch.randint(low, 8, (ROWS,), generator=generator).tolist()
        return [torch.randint(64, (n,), generator=generator).tolist() for n in lengths]

    answers = tokens(1)
    sequences = Sequences.of(tokens(2), [[], *answers[1:]] if seed == 1 else answers)
    before = torch.randn(sequences.tokens.shape, generator=generator) - 4
    return Part(sequences, torch.randn(ROWS, generator=generator), before)


def microbatches(step: int, replica: int) -> list[Part]:
    """Return the microbatches of a step that a data-parallel rank has."""
    first = (step * REPLICAS + replica) * MICROBATCHES
    return [part(first + number) for number in range(MICROBATCHES)]


def loss(logprobs: Tensor, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what needs whole answers (a sigmoid of their sums), and each token by itself."""
    whole = torch.nn.functional.softplus(part.weights * logprobs.sum(1)).sum()
    ratio = (logprobs - part.before).exp() * part.sequences.answers
    tokens = (ratio * part.weights[:, None]).sum()
    return whole + 0.1 * tokens, {"ratio": ratio.detach().sum(), "whole": whole.detach()}


def plain_logprobs(model: Any, sequences: Sequences) -> Tensor:
    """Return [b, s] by log_softmax of the logits, 0 where no answer is."""
    tokens = sequences.tokens
    logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    logprobs = logits.float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logprobs, (1, 0)) * sequences.answers


@dataclasses.dataclass
class Truth:
    """What one rank without a schedule says."""

    logprobs: list[list[Tensor]]
    reference: Tensor
    norms: list[float]
    metrics: list[dict[str, float]]
    end: dict[str, Tensor]


@functools.cache
def truth(world_size: int, kind: str, replicas: int) -> Truth:
    """Train a model of one rank by autograd and torch's Adam alone."""
    alone = one_rank(Layout(dp=world_size))
    with model_parallel(alone):
        chunks = attached(alone, kind)
        (model,) = chunks
        found = Truth([], plain_reference(model), [], [], {})
        factors = [p for _, adapter in named_adapters(chunks) for p in adapter.parameters()]
        adam = torch.optim.Adam(factors, lr=LR, eps=EPS, betas=(0.9, 0.999))
        for step in range(STEPS):
            adam.zero_grad()
            totals = dict.fromkeys(("ratio", "whole"), 0.0)
            for replica in range(replicas):
                parts = microbatches(step, replica)
                each = [plain_logprobs(model, p.sequences) for p in parts]
                for logprobs, own in zip(each, parts, strict=True):
                    value, metrics = loss(logprobs, own)
                    (value / replicas).backward()
                    totals = {name: totals[name] + float(metrics[name]) for name in totals}
                found.logprobs.append([logprobs.detach() for logprobs in each])
            found.norms.append(float(torch.nn.utils.clip_grad_norm_(factors, CLIP)))
            found.metrics.append(totals)
            adam.step()
        found.end = {key: t.clone() for key, t in assemble(chunks, torch.Tensor.detach).items()}
    return found


def plain_reference(model: Any) -> Tensor:
    """Return the log probabilities of the base: every B is zero for a moment."""
    factors = [p for _, a in named_adapters([model]) for n, p in a.named_parameters() if "_B" in n]
    kept = [factor.detach().clone() for factor in factors]
    with torch.no_grad():
        for factor in factors:
            factor.zero_()
        base = plain_logprobs(model, microbatches(0, 0)[0].sequences)
        for factor, value in zip(factors, kept, strict=True):
            factor.copy_(value)
    return base


def attached(layout: Layout, kind: str) -> list[Any]:
    """Build a model with adapters of which B is not zero."""
    chunks = build_model(layout, **KINDS[kind].model)
    load_adapters(apply_lora(chunks, lora_config(kind)), start_values(chunks))
    return chunks


def policy_of(layout: Layout, chunks: list[Any]) -> Policy:
    """Wrap a model as Megatron's training does."""
    trainer = Trainer(chunks, layout, Run(lr=LR, adam_eps=EPS))
    scheduler: Any = None
    return Policy(trainer.models, trainer.optimizer, scheduler)


CASES = [
    (Layout(), "dense"),
    (TP2, "dense"),
    (TP2_SP, "tied embeddings"),
    (CP2, "dense"),
    (DP2, "dense"),
    (PP2, "hybrid"),
    (VPP2, "dense of 4 layers"),
    (EP2, "experts"),
    (TP2_EP2, "experts"),
]


def over_cases() -> Callable[..., Any]:
    """Run a test over the cases, each in the world that its layout needs."""
    marks = {n: getattr(pytest.mark, f"world_{n}") for n in (1, 2, 4)}
    each = [
        pytest.param(layout, kind, id=f"{layout} {kind}", marks=marks[layout.world_size])
        for layout, kind in CASES
    ]
    return pytest.mark.parametrize(("layout", "kind"), each)


@over_cases()
def test_log_probabilities_and_steps_are_those_of_one_rank(layout: Layout, kind: str) -> None:
    expected = truth(layout.world_size, kind, layout.dp)
    with model_parallel(layout):
        chunks = attached(layout, kind)
        policy = policy_of(layout, chunks)
        replica = parallel_state.get_data_parallel_rank()
        with policy.as_reference():
            base = policy.logprobs([p.sequences for p in microbatches(0, 0)])[0]
        torch.testing.assert_close(base, expected.reference, rtol=1e-5, atol=1e-5)
        for step in range(STEPS):
            parts = microbatches(step, replica)
            logprobs = policy.logprobs([p.sequences for p in parts])
            of_oracle = expected.logprobs[step * layout.dp + replica]
            for own, other in zip(logprobs, of_oracle, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
            taken = policy.step(parts, loss)
            assert taken.taken
            assert taken.grad_norm == pytest.approx(expected.norms[step], rel=1e-4)
            assert taken.metrics == pytest.approx(expected.metrics[step], rel=1e-4)
        end = assemble(chunks, torch.Tensor.detach)
    assert not torch.allclose(base, expected.logprobs[0][0], atol=1e-2)
    for name, value in expected.end.items():
        torch.testing.assert_close(end[name], value, rtol=0, atol=2e-5)
