"""What an engine of rollouts takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are sampled: from the model's own distribution, at temperature 1, uncut.

    So the log probabilities of the sampler are those of the policy that is trained. max_tokens:
    where an answer ends at the latest. stop: tokens that end an answer, and belong to it.
    """

    max_tokens: int
    stop: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError where nothing could be sampled."""
        if self.max_tokens < 1:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: an answer has a token at least, set 1 or more"
            )


@dataclass(frozen=True)
class Answer:
    """A sampled answer: tokens, the sampler's log probability of each, and whether it ended.

    ended: by a stop token, which is the last of tokens, rather than by the limit.
    """

    tokens: list[int]
    logprobs: list[float]
    ended: bool


class Engine(Protocol):
    """What samples the answers of a policy that is in training."""

    def sync(self) -> None:
        """Sample from the adapters as they are now, from here on. All ranks must call it."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Return an answer to each prompt, in order; the same on all ranks that hold one replica.

        prompts: this data-parallel rank's tokens, as often as each is to be answered. All ranks
        must call it, with as many prompts each.
        """
        ...
