"""Prompts answered and rewarded, by all replicas of a model together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megalora.data.prompts import Prompt
from megalora.data.tokenizers import Encoder
from megalora.printable import printable
from megalora.rollouts.engine import Answer, Engine, Sampling
from megalora.rollouts.metrics import Outcome
from megalora.rollouts.replicas import Replicas
from megalora.rollouts.rewards import Reward

# Characters of a prompt or an answer that is printed.
_SHOWN = 400


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """This replica's answers, those to one prompt side by side, with their rewards [b].

    outcomes: of all replicas' answers, in the order of the prompts given.
    """

    prompts: Sequence[Prompt]
    answers: list[Answer]
    rewards: Tensor
    outcomes: list[Outcome]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """An engine that answers, and a reward of its answers.

    show: receives a line for each of the first num_shown answers; of the rank that calls it.
    """

    engine: Engine
    reward: Reward
    encoder: Encoder
    replicas: Replicas
    show: Callable[[str], None]
    num_shown: int

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Episodes:
        """Answer prompts, of which each replica takes its part; all ranks must call it.

        prompts: as often as each is answered, as many for each replica. Raises ValueError on all
        ranks where the reward of an answer cannot be told.
        """
        own = self.replicas.share(prompts)
        answers = self.engine.generate([prompt.tokens for prompt in own], sampling)
        # Without the token that ends an answer.
        texts = [self.encoder.decode(a.tokens[: -1 if a.ended else None]) for a in answers]

        def outcomes() -> list[Outcome]:
            return [
                Outcome(self.reward(text, prompt), len(prompt.tokens), len(a.tokens), a.ended)
                for text, prompt, a in zip(texts, own, answers, strict=True)
            ]

        # Once for each replica: a reward may cost, or draw.
        each = self.replicas.each(outcomes)
        found = each[self.replicas.number]
        for prompt, text, outcome in zip(own[: self.num_shown], texts, found, strict=False):
            asked = printable(self.encoder.decode(prompt.tokens), _SHOWN)
            self.show(f"  {asked} -> {printable(text, _SHOWN)} (reward {outcome.reward:g})")
        return Episodes(
            prompts=own,
            answers=answers,
            rewards=torch.tensor([outcome.reward for outcome in found]),
            outcomes=list(chain(*each)),
        )
