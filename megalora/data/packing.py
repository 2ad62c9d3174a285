"""Packing: examples into rows of the sequence length, and the dataset that Megatron serves."""

from bisect import bisect_left, insort
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megalora.data.examples import Examples

if TYPE_CHECKING:
    from megatron.core.datasets.utils import Split

# Rows that packing keeps open: more pack a little better and mix examples over longer distances.
_MAX_OPEN_ROWS = 256


def pack(lengths: np.ndarray, seq_length: int, *, order: np.ndarray) -> list[list[int]]:
    """Return rows of example numbers, each row's lengths summing to at most `seq_length`.

    Each example of `order` goes whole into the open row that it fills best, else into a new one;
    beyond 256 open rows the fullest is closed. O(n log 256), the same for the same arguments.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
    for example in order.tolist():
        length = int(lengths[example])
        best = bisect_left(open_rows, (length, 0))
        if best < len(open_rows):
            space, row = open_rows.pop(best)
        else:
            space, row = seq_length, len(rows)
            rows.append([])
        rows[row].append(example)
        if space > length:
            insort(open_rows, (space - length, row))
        if len(open_rows) > _MAX_OPEN_ROWS:
            open_rows.pop(0)
    return rows


class PackedDataset(Dataset):
    """Map-style dataset of rows, as Megatron's data loaders serve it by consumed samples.

    Sample i is row i modulo the number of rows; with `shuffle` every epoch has an order of its
    own, drawn from (seed, epoch) only, so that a resumed run goes on where the first one stopped.

    A sample has `tokens`, `labels`, `position_ids` [s] int64, `loss_mask` [s] float32,
    `padding_mask` [s] bool (true behind the last example), `cu_seqlens` [s + 1] int32 (starts of
    the examples, filled up with s) and `max_seqlen` int32. The room behind the last example is a
    sequence of its own in `cu_seqlens`.
    """

    def __init__(
        self,
        examples: Examples,
        seq_length: int,
        pad_id: int,
        *,
        packing: bool = True,
        pad_multiple: int = 1,
        num_samples: int | None = None,
        shuffle: bool = True,
        seed: int = 1234,
        split_name: str = "train",
    ) -> None:
        """Pack `examples`, or give each a row where `packing` is off.

        pad_multiple: what the room of each example is a multiple of (2 x context-parallel size,
            where attention is split within examples). num_samples: the length; one epoch if None.
        """
        self.examples = examples
        self.seq_length = seq_length
        self.pad_id = pad_id
        self.shuffle = shuffle
        self.seed = seed
        self.split_name = split_name
        self.room = -(-examples.lengths // pad_multiple) * pad_multiple
        order = np.arange(len(self.room))
        if shuffle:
            order = np.random.default_rng([seed, 0]).permutation(len(self.room))
        self.rows = (
            pack(self.room, seq_length, order=order) if packing else [[i] for i in order.tolist()]
        )
        self.num_samples = len(self.rows) if num_samples is None else num_samples
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def split(self) -> "Split":
        """Return Megatron's own name of the split, by which its loaders choose batch sizes."""
        from megatron.core.datasets.utils import Split

        return Split[self.split_name]

    @property
    def fill(self) -> float:
        """Return the share of positions that hold examples."""
        return float(self.examples.lengths.sum()) / (len(self.rows) * self.seq_length)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, place = divmod(index, len(self.rows))
        return self._sample(self.rows[self._order(epoch)[place] if self.shuffle else place])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + epoch]).permutation(len(self.rows))

    def _sample(self, row: list[int]) -> dict[str, torch.Tensor]:
        s = self.seq_length
        tokens = np.full(s, self.pad_id, np.int64)
        labels = np.full(s, self.pad_id, np.int64)
        loss_mask = np.zeros(s, np.float32)
        position_ids = np.zeros(s, np.int64)
        starts = [0]
        for example in row:
            first, last = self.examples.offsets[example : example + 2]
            ids, trained = self.examples.ids[first:last], self.examples.trained[first:last]
            start, end = starts[-1], starts[-1] + len(ids) - 1
            tokens[start:end] = ids[:-1]
            labels[start:end] = ids[1:]
            loss_mask[start:end] = trained[1:]
            starts.append(start + int(self.room[example]))
            position_ids[start : starts[-1]] = np.arange(starts[-1] - start)
        position_ids[starts[-1] :] = np.arange(s - starts[-1])
        cu_seqlens = np.full(s + 1, s, np.int32)
        cu_seqlens[: len(starts)] = starts
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
            "position_ids": torch.from_numpy(position_ids),
            "padding_mask": torch.arange(s) >= starts[-1],
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": torch.tensor(np.diff(cu_seqlens).max(), dtype=torch.int32),
        }
