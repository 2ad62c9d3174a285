"""Prompts with what their answers are compared with: the data of reinforcement learning."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megalora.data.arguments import add_byte_tokenizer, add_rows
from megalora.data.chats import Chat, Row, read_chat
from megalora.data.examples import hold_out
from megalora.data.rows import load_rows
from megalora.data.sources import Rows
from megalora.data.tokenizers import Encoder
from megalora.progress import Progress


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    answer: any JSON. row: all columns of its row. place: of the row, to be found by a reader.
    """

    tokens: list[int]
    answer: object
    row: Row
    place: str


class Prompts(Sequence[Prompt]):
    """The prompts of a dataset, encoded where they are asked for.

    stop: the tokens that end an answer. digest: of all prompts and answers, to compare ranks by.
    """

    def __init__(self, rows: Rows, encoder: Encoder, max_length: int) -> None:
        """Read and encode every row.

        max_length: tokens of the longest prompt. Raises ValueError with the place of a row that is
        no prompt, or a longer one.
        """
        self.rows, self.encoder, self.max_length = rows, encoder, max_length
        stops: dict[bool, set[int]] = {}
        digest = hashlib.blake2b(digest_size=8)
        with Progress("encoding the prompts", len(rows), "rows") as progress:
            for number in range(len(rows)):
                content, prompt = self._read(number)
                digest.update(repr((prompt.tokens, prompt.answer)).encode())
                if isinstance(content, str) not in stops:
                    stops[isinstance(content, str)] = encoder.stops(content)
                progress.add()
        self.digest = digest.hexdigest()
        self.stop = tuple(sorted(set().union(*stops.values())))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        _, prompt = self._read(index)
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def _read(self, index: int) -> tuple[str | Chat, Prompt]:
        row, place = self.rows[index], self.rows.where(index)
        try:
            content = _content(row)
            tokens = self.encoder.prompt(content)
            if not 0 < len(tokens) <= self.max_length:
                raise ValueError(
                    f"`prompt` has {len(tokens)} tokens, where 1 to {self.max_length} leave room "
                    "for an answer: raise --seq-length, lower --max-tokens, or leave the row out"
                )
        except ValueError as error:
            raise ValueError(f"dataset {place}: {error}") from error
        return content, Prompt(tokens, row["answer"], row, place)


def load_prompts(
    dataset: str,
    encoder: Encoder,
    *,
    split: str = "train",
    eval_dataset: str | None = None,
    eval_fraction: float = 0.0,
    max_length: int,
    seed: int,
) -> tuple[Prompts, Prompts | None]:
    """Return the prompts to train on, and those held out to evaluate on.

    dataset, split, eval_dataset: see `megalora.data.rows.load_rows`. eval_fraction: the share of
    the dataset that is held out where there is no eval_dataset; 0: none. Raises ValueError for what
    cannot be read, and with its place for a row that is no prompt of at most max_length tokens.
    """
    rows, held_out = load_rows(dataset, split), None
    if eval_dataset:
        held_out = load_rows(eval_dataset)
        if num_shared := held_out.num_shared(rows):
            raise ValueError(
                f"eval_dataset {eval_dataset} has {num_shared} rows of dataset {dataset}: give "
                "other rows, or leave --eval-dataset out to hold some of these out"
            )
    elif eval_fraction:
        if len(rows) - max(1, round(eval_fraction * len(rows))) < 1:
            raise ValueError(
                f"dataset {dataset} has {len(rows)} rows, too few to hold some out with "
                f"eval_fraction {eval_fraction}: lower it, or give --eval-dataset"
            )
        rows, held_out = hold_out(rows, eval_fraction, seed)
    trained_on = Prompts(rows, encoder, max_length)
    return trained_on, None if held_out is None else Prompts(held_out, encoder, max_length)


def add_prompt_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that name prompts, and return the parser."""
    group = parser.add_argument_group("prompts", "what is answered, and how answers end")
    add = group.add_argument
    add(
        "--dataset",
        metavar="DATA",
        help="a json, jsonl or parquet file, a folder of such files, or a Hugging Face dataset, "
        "with the columns `prompt` (text, or messages of a chat) and `answer` (any JSON)",
    )
    add_rows(group, "prompts")
    add(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="tokens of an answer at most (default 256)",
    )
    _add_evaluation(group)
    add_byte_tokenizer(group)
    return parser


def _add_evaluation(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("--eval-dataset", metavar="DATA", help="prompts to evaluate on, in the same form")
    add(
        "--eval-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="share of --dataset held out for --eval-interval without --eval-dataset "
        "(default 0.05)",
    )
    add(
        "--eval-prompts",
        type=int,
        default=128,
        metavar="N",
        help="held-out prompts that each evaluation answers, at most (default 128)",
    )


def _content(row: Row) -> str | Chat:
    """Return the prompt of a row, text or a chat that ends with what is to be answered."""
    missing = [name for name in ("prompt", "answer") if name not in row]
    if missing:
        raise ValueError(
            f"no {' and no '.join(f'`{name}`' for name in missing)}, but {list(row)}: a row has a "
            "`prompt`, and an `answer` for the reward (null where the reward needs none)"
        )
    if isinstance(row["prompt"], str):
        return row["prompt"]
    chat = read_chat(row, "prompt")
    if chat.messages[-1]["role"] == "assistant":
        raise ValueError(
            "the last message of `prompt` is the assistant's: end with what is to be answered"
        )
    return chat
