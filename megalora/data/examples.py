"""Examples: encoded rows, cut to the sequence length and stored flat."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megalora.data.rows import Row
from megalora.data.tokenizers import Encoder, Tokens


class Examples(NamedTuple):
    """Examples one after another: example k is `ids[offsets[k]:offsets[k+1]]`.

    ids: [n] int32. trained: [n] bool, targets of the loss. offsets: [examples + 1] int64.
    num_cut: examples that lost their end to the sequence length. num_dropped: rows without a
    trained token.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    num_cut: int
    num_dropped: int

    @property
    def lengths(self) -> np.ndarray:
        """Return how many positions each example takes: its last token is a label only."""
        return np.diff(self.offsets) - 1


def encode_rows(
    rows: Iterable[Row], schema: str, encoder: Encoder, seq_length: int
) -> Iterator[tuple[Tokens, bool]]:
    """Yield each example of `rows`, at most `seq_length + 1` tokens, and whether it was cut.

    Text longer than that goes on in the next example, whose first token is the last one of the
    example before, so that every token is predicted once; anything else is cut at its end.
    Raises ValueError for a row that does not hold what its columns promise.
    """
    for number, row in enumerate(rows):
        try:
            encoded = _encode(row, schema, encoder)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"dataset row {number} does not hold the {schema} it should ({error!r}): messages "
                "are lists of {role, content}, all else are strings"
            ) from error
        for tokens in encoded:
            if schema == "text":
                for start in range(0, len(tokens.ids) - 1, seq_length):
                    yield _window(tokens, start, seq_length), False
            else:
                yield _window(tokens, 0, seq_length), len(tokens.ids) > seq_length + 1


def gather_examples(encoded: Iterable[tuple[Tokens, bool]], dataset: str) -> Examples:
    """Store examples flat; those without a trained token are dropped and counted.

    Raises ValueError where that leaves none.
    """
    ids, trained, num_cut, num_dropped = [], [], 0, 0
    for tokens, was_cut in encoded:
        num_cut += was_cut
        if not any(tokens.trained[1:]):
            num_dropped += 1
            continue
        ids.append(np.asarray(tokens.ids, np.int32))
        trained.append(np.asarray(tokens.trained, bool))
    if not ids:
        raise ValueError(
            f"dataset {dataset} leaves no token to train on in any of its {num_dropped} examples: "
            "answers are empty or lie behind seq_length: raise --seq-length or shorten the prompts"
        )
    offsets = np.cumsum([0, *(len(example) for example in ids)])
    return Examples(np.concatenate(ids), np.concatenate(trained), offsets, num_cut, num_dropped)


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into those to train on and a random `fraction`, at least one, to validate on."""
    num_held_out = max(1, round(fraction * len(rows)))
    if num_held_out >= len(rows):
        raise ValueError(
            f"dataset has {len(rows)} rows, too few to hold out {num_held_out} for validation: "
            "set --dataset-valid-split, or --eval-iters 0"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = set(order[:num_held_out].tolist())
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [rows[number] for number in sorted(held_out)]


def _encode(row: Row, schema: str, encoder: Encoder) -> list[Tokens]:
    if schema == "messages":
        return encoder.chat(row["messages"])
    if schema == "completion":
        return [encoder.completion(row["prompt"], row["completion"])]
    return [encoder.text(row["text"])]


def _window(tokens: Tokens, start: int, seq_length: int) -> Tokens:
    end = start + seq_length + 1
    return Tokens(tokens.ids[start:end], tokens.trained[start:end])
