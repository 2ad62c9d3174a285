"""Policy gradient on answers that can be checked, sampled from the policy that is trained.

The base has learned two rival languages at once and continues a prompt by either. An answer of two
tokens is right where both follow the second language.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.regret import task
from megalora.losses import group_advantages, policy_gradient_loss, vocab_parallel_logprobs

if TYPE_CHECKING:
    from benchmarks.regret.jobs import Job

PROMPT_LENGTH, ANSWER_LENGTH = 6, 2
GROUP_SIZE = 8
# Updates on one batch of samples: all but the first are off policy, which the ratio corrects.
UPDATES = 2


def reinforce(trainer: Any, job: "Job") -> list[float]:
    """Train by reinforcement and return the share of right answers at each step.

    job.batch_size: prompts of a step, each answered GROUP_SIZE times.
    """
    generator = torch.Generator().manual_seed(job.seed)
    tables = [task.base_table(), task.rival_table()]
    curve = []
    for _ in range(job.steps):
        prompts = task.sequences(tables, job.batch_size, generator)[:, :PROMPT_LENGTH]
        tokens = sample(trainer, prompts.repeat_interleave(GROUP_SIZE, 0), generator)
        with torch.no_grad():
            sampler_logprobs = answer_logprobs(trainer, tokens)
        rewards = is_right(tokens).float()
        curve.append(rewards.mean().item())
        advantages = group_advantages(rewards, GROUP_SIZE)
        for part in torch.arange(len(tokens)).chunk(UPDATES):
            logprobs = answer_logprobs(trainer, tokens[part])
            loss = policy_gradient_loss(
                logprobs, sampler_logprobs[:, part], advantages[part], torch.ones_like(logprobs)
            )
            trainer.step(loss / len(part))
    return curve


@torch.no_grad()
def sample(trainer: Any, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Return tokens [b, s] with ANSWER_LENGTH sampled ones after them."""
    for _ in range(ANSWER_LENGTH):
        probabilities = trainer.logits(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1, generator=generator)], dim=1)
    return tokens


def answer_logprobs(trainer: Any, tokens: Tensor) -> Tensor:
    """Return the log probabilities of the answers, [ANSWER_LENGTH, b]."""
    logits = trainer.logits(tokens[:, :-1])[:, -ANSWER_LENGTH:].transpose(0, 1).contiguous()
    return vocab_parallel_logprobs(logits, tokens[:, -ANSWER_LENGTH:].T.contiguous())


def is_right(tokens: Tensor) -> Tensor:
    """Say for each row whether all its answer follows the rival language."""
    rules = task.rival_table()
    right = [
        rules[tokens[:, t - 2], tokens[:, t - 1]] == tokens[:, t]
        for t in range(PROMPT_LENGTH, PROMPT_LENGTH + ANSWER_LENGTH)
    ]
    return torch.stack(right).all(0)
