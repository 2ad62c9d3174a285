"""Reinforcement learning of a base that speaks two languages and is rewarded for one.

The base has learned two rival languages at once and continues a prompt by either. An answer of two
tokens is right where both follow the second language.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.regret import task
from benchmarks.regret.job import GROUP_SIZE, Base, Job
from megalora.losses import group_advantages, policy_gradient_loss, vocab_parallel_logprobs

# Updates on one batch of answers: all but the first are off policy, which the ratio corrects.
NUM_UPDATES = 2
MAX_STEPS = 1_000_000


class Policy(Protocol):
    """A model that is trained."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [b, s, v] for tokens [b, s]."""
        ...

    def step(self, losses: Iterable[Tensor]) -> None:
        """Update by the gradient of the sum of losses, of which one at a time is computed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Answers, tokens [b, s], with their log probabilities when sampled, [answer, b]."""

    tokens: Tensor
    logprobs: Tensor
    rewards: Tensor


class RivalLanguage:
    """Continue a prompt by the second language."""

    prompt_length, answer_length, vocab_size = 6, 2, task.VOCAB_SIZE

    def __init__(self, base: Base) -> None:
        self.tables = languages(base)
        self.rules = self.tables[1]

    def prompts(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw prompts [num, prompt_length] in which both languages are mixed."""
        return task.sequences(self.tables, num, generator)[:, : self.prompt_length]

    def rewards(self, tokens: Tensor) -> Tensor:
        """Return 1 for each row whose whole answer follows the second language, else 0."""
        right = [
            self.rules[tokens[:, t - 2], tokens[:, t - 1]] == tokens[:, t]
            for t in range(self.prompt_length, tokens.shape[1])
        ]
        return torch.stack(right).all(0).float()


def languages(base: Base) -> list[Tensor]:
    """Return the two languages of a base.

    Of `halves`, the second is known by its half of the vocabulary: there is little to learn. Of
    `ambiguous`, it has to be learned for each pair of tokens which of the two is the second's.
    """
    return task.halved_tables() if base == "halves" else [task.base_table(), task.rival_table()]


def collect(policy: Policy, language: RivalLanguage, num: int, seed: int) -> Batch:
    """Answer `num` prompts GROUP_SIZE times each by the policy as it is now."""
    generator = torch.Generator().manual_seed(seed)
    tokens = language.prompts(num, generator).repeat_interleave(GROUP_SIZE, 0)
    with torch.no_grad():
        for _ in range(language.answer_length):
            probabilities = policy.logits(tokens)[:, -1].float().softmax(-1).cpu()
            drawn = probabilities.multinomial(1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
        logprobs = answer_logprobs(policy, tokens, language.answer_length)
    return Batch(tokens=tokens, logprobs=logprobs, rewards=language.rewards(tokens))


def answer_logprobs(policy: Policy, tokens: Tensor, answer_length: int) -> Tensor:
    """Return the log probabilities of the answers at the end of tokens, [answer, b]."""
    logits = policy.logits(tokens[:, :-1])[:, -answer_length:].transpose(0, 1).contiguous()
    return vocab_parallel_logprobs(logits, tokens[:, -answer_length:].T.contiguous())


def learn(policy: Policy, batch: Batch, advantages: Tensor) -> None:
    """Take NUM_UPDATES optimizer steps, each on its part of the answers."""

    def loss(part: Tensor) -> Iterator[Tensor]:
        logprobs = answer_logprobs(policy, batch.tokens[part], len(batch.logprobs))
        yield policy_gradient_loss(
            logprobs, batch.logprobs[:, part], advantages[part], torch.ones_like(logprobs)
        ) / len(part)

    for part in torch.arange(len(batch.tokens)).chunk(NUM_UPDATES):
        policy.step(loss(part))


def reinforce(policy: Policy, job: Job) -> list[float]:
    """Train by reinforcement and return the share of right answers at each step.

    job.batch_size: prompts of a step, each answered GROUP_SIZE times.
    """
    rival, curve = RivalLanguage(job.base), []
    for step in range(job.steps):
        batch = collect(policy, rival, job.batch_size, job.seed * MAX_STEPS + step)
        curve.append(batch.rewards.mean().item())
        learn(policy, batch, group_advantages(batch.rewards, GROUP_SIZE))
    return curve
