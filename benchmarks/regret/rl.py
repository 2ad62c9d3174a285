"""The loop of examples/rl_lora.py on a base that speaks two languages and is rewarded for one.

The base has learned two rival languages at once and continues a prompt by either. An answer of two
tokens is right where both follow the second language.
"""

import torch
from torch import Tensor

from benchmarks.regret import task
from benchmarks.regret.job import GROUP_SIZE, Base, Job
from examples.rl_lora import Policy, collect, learn
from megalora.losses import group_advantages

# Updates on one batch of answers: all but the first are off policy, which the ratio corrects.
NUM_UPDATES = 2
MAX_STEPS = 1_000_000


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


def reinforce(policy: Policy, job: Job) -> list[float]:
    """Train by reinforcement and return the share of right answers at each step.

    job.batch_size: prompts of a step, each answered GROUP_SIZE times.
    """
    rival, curve = RivalLanguage(job.base), []
    for step in range(job.steps):
        seed = job.seed * MAX_STEPS + step
        batch = collect(policy, rival, job.batch_size, GROUP_SIZE, seed)
        curve.append(batch.rewards.mean().item())
        learn(
            policy,
            batch,
            group_advantages(batch.rewards, GROUP_SIZE),
            num_updates=NUM_UPDATES,
            micro_batch_size=len(batch.tokens),
        )
    return curve
