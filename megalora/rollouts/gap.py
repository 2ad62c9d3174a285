"""How far the sampler's log probabilities are from the learner's, which the ratio corrects."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters import world
from megalora.rollouts.engine import Answer


@dataclass(frozen=True)
class Gap:
    """Over all sampled tokens, in nats: mean and largest distance, and KL(sampler || learner)."""

    mean: float
    largest: float
    kl: float


def gap(
    learner_logprobs: Sequence[Tensor | Sequence[float]],
    answers: Sequence[Answer],
    *,
    group: ProcessGroup | None = None,
) -> Gap:
    """Compare the learner's log probabilities of answers with those that the engine gave.

    learner_logprobs: of each answer, one for each of its tokens. group: the data-parallel ranks to
    measure over, all of which must call this; None measures these answers alone. The KL divergence
    is estimated by the mean of r - 1 - log r, r = learner / sampler, which is never negative.
    Source: Schulman, "Approximating KL Divergence", 2020. Raises ValueError where lengths differ.
    """
    sizes = [len(own) for own in learner_logprobs]
    expected = [len(answer.tokens) for answer in answers]
    if sizes != expected:
        raise ValueError(
            f"learner_logprobs have {sizes} tokens and answers {expected}: give one log "
            "probability for each token of each answer"
        )
    learner = [number for own in learner_logprobs for number in _numbers(own)]
    sampler = [number for answer in answers for number in answer.logprobs]
    log_ratio = torch.tensor(learner, dtype=torch.float64) - torch.tensor(
        sampler, dtype=torch.float64
    )
    distance = log_ratio.abs()
    sums = torch.stack([distance.sum(), (log_ratio.expm1() - log_ratio).sum()])
    sums = torch.cat([sums, torch.tensor([len(learner)], dtype=torch.float64)])
    largest = distance.max() if learner else sums.new_zeros(())
    if group is not None:
        sums, largest = _over(group, sums, largest)
    count = max(float(sums[2]), 1.0)
    return Gap(float(sums[0]) / count, float(largest), float(sums[1]) / count)


def _numbers(logprobs: Tensor | Sequence[float]) -> list[float]:
    return logprobs.tolist() if isinstance(logprobs, Tensor) else list(logprobs)


def _over(group: ProcessGroup, sums: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    most = torch.tensor(world.largest([float(largest)], group), dtype=torch.float64)
    return world.summed(sums, group), most[0]
