"""Prompts with their answers, as a model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megalora.data.tokenizers import Tokens


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their answers, a row each.

    tokens: [b, s] int64, filled up at their right. lengths: [b] int64, without what fills them up.
    answers: [b, s] bool, true on the tokens of answers.
    """

    tokens: Tensor
    lengths: Tensor
    answers: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> "Sequences":
        """Lay each answer behind its prompt, on the CPU.

        Raises ValueError for a prompt without a token: what follows from nothing has no
        probability.
        """
        if not all(prompts):
            raise ValueError("a prompt has no token: its answer's first one follows from nothing")
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        starts = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        places = torch.arange(max(map(len, rows), default=0))
        tokens = torch.zeros(len(rows), len(places), dtype=torch.int64)
        for row, into in zip(rows, tokens, strict=True):
            into[: len(row)] = torch.tensor(row)
        answered = (places >= starts[:, None]) & (places < lengths[:, None])
        return cls(tokens=tokens, lengths=lengths, answers=answered)

    @classmethod
    def encoded(cls, rows: Sequence[Tokens]) -> "Sequences":
        """Lay out rows of which the trained tokens are the answers', on the CPU."""
        lengths = torch.tensor([len(row.ids) for row in rows], dtype=torch.int64)
        tokens = [torch.tensor(row.ids, dtype=torch.int64) for row in rows]
        answers = [torch.tensor(row.trained, dtype=torch.bool) for row in rows]
        return cls(
            tokens=pad_sequence(tokens, batch_first=True),
            lengths=lengths,
            answers=pad_sequence(answers, batch_first=True),
        )

    def to(self, device: torch.device) -> "Sequences":
        """Return them on a device."""
        return Sequences(
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            answers=self.answers.to(device),
        )

    def rows(self, index: Tensor | slice) -> "Sequences":
        """Return some of the rows."""
        return Sequences(
            tokens=self.tokens[index], lengths=self.lengths[index], answers=self.answers[index]
        )

    def filled(self, length: int) -> "Sequences":
        """Return them filled up to a length, or cut to one that holds them all."""
        more = (0, length - self.tokens.shape[1])
        pad = torch.nn.functional.pad
        return replace(self, tokens=pad(self.tokens, more), answers=pad(self.answers, more))

    @property
    def padding(self) -> Tensor:
        """Return [b, s] bool, true where a row is filled up."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return places >= self.lengths[:, None]
