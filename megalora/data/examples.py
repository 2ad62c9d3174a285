"""Examples: encoded rows, cut to the sequence length and stored flat."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megalora.data.chats import CHAT_COLUMNS, Chat, Row, read_chat
from megalora.data.rows import SCHEMAS
from megalora.data.sources import Rows
from megalora.data.tokenizers import Encoder, Tokens


class Example(NamedTuple):
    """One example, and how many trained tokens it lost to the sequence length."""

    tokens: Tokens
    num_lost: int = 0
    is_cut: bool = False


class Examples(NamedTuple):
    """Examples one after another: example k is `ids[offsets[k]:offsets[k+1]]`.

    ids: [n] int32. trained: [n] bool, targets of the loss. offsets: [examples + 1] int64.
    num_cut: examples that lost their end to the sequence length, num_lost: the trained tokens in
    it, num_beyond: how many lost all of those and are left out. num_unanswered: examples left out
    because nothing in them is to be trained on.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    num_cut: int = 0
    num_lost: int = 0
    num_beyond: int = 0
    num_unanswered: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Return how many positions each example takes: its last token is a label only."""
        return np.diff(self.offsets) - 1


class Content(NamedTuple):
    """What a row holds: a chat, or a prompt (none for text) and what is trained on behind it."""

    chat: Chat | None = None
    prompt: str | None = None
    text: str = ""


def read_rows(rows: Sequence[Row], schema: str) -> Iterator[tuple[str, Row, Content]]:
    """Yield the place, the row and the content of each row.

    Raises ValueError with the place of a row that does not hold what its columns promise.
    """
    for number in range(len(rows)):
        place = rows.where(number) if isinstance(rows, Rows) else f"row {number}"
        row = rows[number]
        try:
            content = _read(row, schema)
        except ValueError as error:
            raise ValueError(f"dataset {place}: {error}") from error
        yield place, row, content


def encode_rows(
    rows: Sequence[Row],
    schema: str,
    encoder: Encoder,
    seq_length: int,
    unused: set[str] | None = None,
    progress: Callable[[], object] | None = None,
) -> Iterator[Example]:
    """Yield each example of `rows`, at most `seq_length + 1` tokens.

    Text longer than that goes on in the next example, whose first token is the last one of the
    example before, so that every token is predicted once; anything else is cut at its end.
    unused: receives the names of columns, and of keys of messages, that hold something which no
    token comes from. progress: called after each row. Raises ValueError for a row that does not
    hold what its columns promise.
    """
    for place, row, content in read_rows(rows, schema):
        try:
            encoded = encode(content, encoder)
        except ValueError as error:
            raise ValueError(f"dataset {place}: {error}") from error
        if unused is not None:
            unused |= _unused(row, schema, content, encoder)
        for tokens in encoded:
            if schema == "text":
                for start in range(0, len(tokens.ids) - 1, seq_length):
                    yield Example(_window(tokens, start, seq_length))
            else:
                num_lost = sum(tokens.trained[seq_length + 1 :])
                is_cut = len(tokens.ids) > seq_length + 1
                yield Example(_window(tokens, 0, seq_length), num_lost, is_cut)
        if progress is not None:
            progress()


def gather_examples(encoded: Iterable[Example], dataset: str) -> Examples:
    """Store examples flat; those without a trained token are left out and counted.

    Raises ValueError where that leaves none.
    """
    ids, trained = [], []
    num_cut, num_lost, num_beyond, num_unanswered = 0, 0, 0, 0
    for example in encoded:
        num_cut += example.is_cut
        num_lost += example.num_lost
        if any(example.tokens.trained[1:]):
            ids.append(np.asarray(example.tokens.ids, np.int32))
            trained.append(np.asarray(example.tokens.trained, bool))
        elif example.num_lost:
            num_beyond += 1
        else:
            num_unanswered += 1
    if not ids:
        raise ValueError(_nothing_to_train_on(dataset, num_beyond, num_unanswered))
    offsets = np.cumsum([0, *(len(example) for example in ids)])
    counts = (num_cut, num_lost, num_beyond, num_unanswered)
    return Examples(np.concatenate(ids), np.concatenate(trained), offsets, *counts)


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows into those to train on and a random `fraction`, at least one, to validate on."""
    num_held_out = max(1, round(fraction * len(rows)))
    if num_held_out >= len(rows):
        raise ValueError(
            f"dataset has {len(rows)} rows, too few to hold out {num_held_out} for validation: "
            "set --dataset-valid-split, or --eval-iters 0"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[num_held_out:])), rows.select(np.sort(order[:num_held_out]))


def _read(row: Row, schema: str) -> Content:
    missing = [column for column in SCHEMAS[schema] if row.get(column) is None]
    if missing:
        filled = [column for column, value in row.items() if value is not None]
        raise ValueError(
            f"no {' and no '.join(f'`{name}`' for name in missing)}, which the first row has, but "
            f"{filled}: bring all rows to one kind, or leave the row out"
        )
    if schema == "text":
        return Content(text=_string(row, "text"))
    if schema == "completion" and isinstance(row["prompt"], str):
        return Content(prompt=_string(row, "prompt"), text=_string(row, "completion"))
    return Content(chat=read_chat(row, schema))


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"`{column}` is {value!r:.60}, not text")
    return value


def encode(content: Content, encoder: Encoder) -> list[Tokens]:
    """Return the examples of a row's content: one, but of some chats."""
    if content.chat is not None:
        return encoder.chat(content.chat)
    if content.prompt is None:
        return [encoder.text(content.text)]
    return [encoder.completion(content.prompt, content.text)]


def _unused(row: Row, schema: str, content: Content, encoder: Encoder) -> set[str]:
    used = {*SCHEMAS[schema], *(CHAT_COLUMNS if content.chat else ())}
    columns = {name for name, value in row.items() if value is not None} - used
    return columns | (encoder.unread_keys(content.chat) if content.chat else set())


def _nothing_to_train_on(dataset: str, num_beyond: int, num_unanswered: int) -> str:
    start = f"dataset {dataset} leaves no token to train on in any of its "
    if not num_beyond:
        return (
            f"{start}{num_unanswered} examples: no chat has a message of the role assistant "
            "behind another one, or no text has a token: add the answers"
        )
    rest = f", the other {num_unanswered} have no answer" if num_unanswered else ""
    return (
        f"{start}{num_beyond + num_unanswered} examples: in {num_beyond} of them the answer lies "
        f"behind seq_length{rest}: raise --seq-length or shorten the prompts"
    )


def _window(tokens: Tokens, start: int, seq_length: int) -> Tokens:
    end = start + seq_length + 1
    return Tokens(tokens.ids[start:end], tokens.trained[start:end])
