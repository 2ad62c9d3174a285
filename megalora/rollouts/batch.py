"""A batch of prompts whose answers are being sampled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalora.rollouts.engine import Answer


@dataclass
class Batch:
    """Prompts with their answers so far.

    tokens: [b, s]; lengths: of prompts, [b]; numbers: what decides answers, [b, max_tokens];
    shortest: the length of the shortest prompt, on all ranks that step together. rows: which of b
    are still sampled, [r].
    """

    tokens: Tensor
    lengths: Tensor
    numbers: Tensor
    shortest: int
    rows: Tensor = field(init=False)
    logprobs: Tensor = field(init=False)
    sizes: Tensor = field(init=False)
    stopped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.logprobs = torch.zeros_like(self.numbers, dtype=torch.float32)
        self.sizes = torch.zeros_like(self.lengths)
        self.stopped = torch.zeros_like(self.lengths, dtype=torch.bool)

    @property
    def done(self) -> Tensor:
        """Which answers have ended, [b]."""
        return self.stopped | (self.sizes == self.numbers.shape[1])

    def numbers_at(self, end: int) -> Tensor:
        """Return what decides the tokens of the rows at `end`, [r]."""
        place = (end - self.lengths).clamp(0, self.numbers.shape[1] - 1)
        return self.numbers.gather(1, place[:, None])[self.rows, 0]

    def add(self, end: int, tokens: Tensor, logprobs: Tensor, *, stop: Tensor) -> None:
        """Put tokens [r] at `end` of the answers that have begun and not ended."""
        begun = ((self.lengths <= end) & ~self.done)[self.rows]
        rows, tokens = self.rows[begun], tokens[begun]
        self.tokens[rows, end] = tokens
        self.logprobs[rows, self.sizes[rows]] = logprobs[begun]
        self.sizes[rows] += 1
        self.stopped[rows] = torch.isin(tokens, stop)

    def kept_of_rows(self) -> Tensor | None:
        """Drop rows whose answers have ended, where they are half of all or more.

        Returns which of the rows are kept, or None where all are.
        """
        going = (~self.done[self.rows]).nonzero()[:, 0]
        if 2 * len(going) > len(self.rows):
            return None
        self.rows = self.rows[going]
        return going

    def answers(self) -> list[Answer]:
        """Return what has been sampled."""
        parts = (self.tokens, self.lengths, self.logprobs, self.sizes, self.stopped)
        rows = zip(*(part.tolist() for part in parts), strict=True)
        return [
            Answer(tokens[length : length + size], logprobs[:size], stopped)
            for tokens, length, logprobs, size, stopped in rows
        ]


def in_batches(
    lengths: Sequence[int], *, max_batch_size: int, max_spread: int | None
) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches, by length.

    max_spread: by how many tokens prompts of a batch may differ, since a batch reads what is longer
    than its shortest prompt token by token; None for any number.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        spread = lengths[index] - lengths[batch[0]] if batch else 0
        if len(batch) == max_batch_size or (max_spread is not None and spread > max_spread):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
