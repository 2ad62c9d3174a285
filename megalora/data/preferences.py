"""Preferences as tokens: a chosen and a rejected answer, each behind the prompt of both.

Which tokens count, and what is cut, is what TRL's `DPOTrainer` does.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalora.data.chats import CHAT_COLUMNS, Row
from megalora.data.examples import Content, encode, hold_out
from megalora.data.order import Order
from megalora.data.pairs import ANSWERS, read_pair, shared
from megalora.data.rows import files_left_out, load_rows
from megalora.data.sources import Rows
from megalora.data.tokenizers import Encoder, Tokens
from megalora.progress import Progress


class Pair(NamedTuple):
    """Two answers, each behind its prompt; `trained` marks the tokens of the answer."""

    chosen: Tokens
    rejected: Tokens


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Pairs one after another: answer k is `ids[offsets[k]:offsets[k+1]]`, chosen ones are even.

    ids: [n] int32. trained: [n] bool. num_cut: pairs of which an answer lost its end to the
    sequence length; num_beyond: pairs left out, their prompt alone fills it; num_alike: pairs left
    out, their tokens (as cut) are equal.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    num_cut: int = 0
    num_beyond: int = 0
    num_alike: int = 0

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // 2

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Pair(self._answer(2 * index), self._answer(2 * index + 1))

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def batch(self, iteration: int, size: int, seed: int) -> list[Pair]:
        """Return the pairs of an iteration (the first is 0).

        They are dealt out pass by pass, each in an order of its own, drawn from (seed, pass): a
        resumed run goes on where the first one stopped, on any layout.
        """
        return [self[index] for index in Order(len(self), seed).take(iteration * size, size)]

    def _answer(self, number: int) -> Tokens:
        first, last = self.offsets[number : number + 2]
        return Tokens(self.ids[first:last].tolist(), self.trained[first:last].tolist())


def load_preferences(
    dataset: str,
    encoder: Encoder,
    seq_length: int,
    *,
    split: str = "train",
    valid_split: str | None = None,
    valid_fraction: float = 0.0,
    seed: int = 1234,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[Preferences, Preferences | None]:
    """Return the pairs to train on, and those held out.

    dataset, split, valid_split: see `megalora.data.rows.load_rows`. valid_fraction: the share of
    the rows that is held out where there is no valid_split; 0: none. log: receives a line for each,
    and a warning of what nothing is made of. Raises ValueError for what cannot be read, and with
    its place for a row that holds no preference.
    """
    rows, held_out = load_rows(dataset, split), None
    if valid_split:
        held_out = load_rows(dataset, valid_split)
        if num_shared := held_out.num_shared(rows):
            log(f"WARNING: {num_shared} of {len(held_out)} held-out rows are trained on too")
    elif valid_fraction:
        rows, held_out = hold_out(rows, valid_fraction, seed)
    unused: set[str] = set()

    def encoded(name: str, own: Rows) -> Preferences:
        with Progress(f"encoding the {name} pairs", len(own), "rows") as progress:
            pairs = encode_pairs(own, encoder, unused, progress.add)
            found = gather_pairs(pairs, dataset, seq_length)
        log(_describe(name, found))
        return found

    trained_on = encoded("train", rows)
    valid = None if held_out is None else encoded("valid", held_out)
    if notes := _notes(dataset, unused, encoder):
        log(f"WARNING: dataset {dataset}: {'; '.join(notes)}")
    return trained_on, valid


def _notes(dataset: str, unused: set[str], encoder: Encoder) -> list[str]:
    """Say what of a dataset is not trained on."""
    notes = [f"nothing is made of {sorted(unused)}"] if unused else []
    notes += [f"not read: {left}"] if (left := files_left_out(dataset)) else []
    return [*notes, *(f"{number} {note}" for note, number in encoder.notes.items())]


def encode_pairs(
    rows: Sequence[Row],
    encoder: Encoder,
    unused: set[str] | None = None,
    progress: Callable[[], object] | None = None,
) -> Iterator[Pair]:
    """Yield the whole pair of each row.

    The answer's tokens are those of what the assistant says, and what the template writes behind
    its last answer, which TRL counts too. Where prompt and answer merge into a token that the two
    answers do not share, it belongs to both answers. unused: receives the names of columns that no
    token comes from. progress: called after each row. Raises ValueError with the place of a row
    that holds no preference.
    """
    for number in range(len(rows)):
        place = rows.where(number) if isinstance(rows, Rows) else f"row {number}"
        row = rows[number]
        try:
            contents = read_pair(row)
            chosen, rejected = (_encoded(content, encoder) for content in contents)
        except ValueError as error:
            raise ValueError(f"dataset {place}: {error}") from error
        if unused is not None:
            used = {"prompt", *ANSWERS, *(CHAT_COLUMNS if contents[0].chat else ())}
            unused |= {name for name, value in row.items() if value is not None} - used
        if progress is not None:
            progress()
        yield _from_where_they_part(chosen, rejected)


def gather_pairs(pairs: Iterable[Pair], dataset: str, seq_length: int) -> Preferences:
    """Store pairs flat, each answer cut to its first `seq_length` tokens (TRL's `keep_start`).

    Pairs whose prompt alone is as long, and pairs that are equal then, are left out and counted.
    Raises ValueError where that leaves none.
    """
    kept: list[Tokens] = []
    num_cut, num_beyond, num_alike = 0, 0, 0
    for pair in pairs:
        cut = [Tokens(one.ids[:seq_length], one.trained[:seq_length]) for one in pair]
        if not all(any(one.trained) for one in cut):
            num_beyond += 1
        elif cut[0].ids == cut[1].ids:
            num_alike += 1
        else:
            num_cut += max(len(one.ids) for one in pair) > seq_length
            kept += cut
    if not kept:
        raise ValueError(
            f"dataset {dataset} leaves no pair to train on: of {num_beyond} the prompt alone fills "
            f"seq_length {seq_length}, {num_alike} are equal in their first {seq_length} tokens: "
            "raise --seq-length, or give other pairs"
        )
    return Preferences(
        ids=np.concatenate([np.asarray(one.ids, np.int32) for one in kept]),
        trained=np.concatenate([np.asarray(one.trained, bool) for one in kept]),
        offsets=np.cumsum([0, *(len(one.ids) for one in kept)]),
        num_cut=num_cut,
        num_beyond=num_beyond,
        num_alike=num_alike,
    )


def _encoded(content: Content, encoder: Encoder) -> Tokens:
    """Return an answer behind its prompt, trained from its first token to the end of the text."""
    found = encode(content, encoder)
    if len(found) != 1:
        raise ValueError(
            f"the chat template writes the answers of one row in {len(found)} different ways: "
            "leave one answer in `chosen` and in `rejected`"
        )
    ids, trained = list(found[0].ids), list(found[0].trained)
    if content.chat is None and ids[-2:] == [ids[-1]] * 2:  # the text brings its end token
        del ids[-1], trained[-1]
    if not any(trained):
        raise ValueError("an answer has no token: leave the row out")
    last = len(trained) - trained[::-1].index(True)
    return Tokens(ids, [*trained[:last], *[True] * (len(ids) - last)])


def _from_where_they_part(chosen: Tokens, rejected: Tokens) -> Pair:
    """Let both answers begin where they differ at the latest; the first token follows nothing."""
    starts = [tokens.trained.index(True) for tokens in (chosen, rejected)]
    start = max(1, min(*starts, len(shared(chosen.ids, rejected.ids))))
    pair = []
    for tokens, own in zip((chosen, rejected), starts, strict=True):
        marks = [*tokens.trained[:start], *[True] * (own - start), *tokens.trained[own:]]
        pair.append(Tokens(tokens.ids, [False, *marks[1:]]))
    return Pair(*pair)


def _describe(name: str, found: Preferences) -> str:
    line = (
        f"{name} data: {len(found)} pairs, {int(found.trained.sum())} tokens of answers of "
        f"{len(found.ids)}"
    )
    if found.num_cut:
        line += f"; {found.num_cut} pairs cut to --seq-length"
    if found.num_beyond:
        line += f"; {found.num_beyond} left out, their prompt fills --seq-length"
    if found.num_alike:
        line += f"; {found.num_alike} left out, their tokens are equal"
    return line


def add_preference_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of learning from preferences, and return the parser."""
    group = parser.add_argument_group(
        "preferences", "each row is a pair of answers; --seq-length cuts prompt and answer"
    )
    group.add_argument(
        "--beta",
        type=float,
        default=0.1,
        metavar="X",
        help="weight of the base in the rewards: a reward is beta times how many nats likelier an "
        "answer is than by the base (default 0.1)",
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        default=0.0,
        metavar="X",
        help="share of the pairs that are labelled the wrong way round, from 0 to below 0.5 "
        "(default 0)",
    )
    return parser
