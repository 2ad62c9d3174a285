"""From a dataset's name to the train, validation and test datasets that Megatron serves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megalora.data.examples import encode_rows, gather_examples, hold_out, read_rows
from megalora.data.packing import PackedDataset
from megalora.data.rows import EMBEDDED, files_left_out, load_rows, schema_of
from megalora.data.sources import Rows
from megalora.data.tokenizers import Encoder, Tokenizer, encoder_for
from megalora.progress import Progress

type Datasets = tuple[PackedDataset | None, PackedDataset | None, PackedDataset | None]
type SplitName = Literal["train", "valid", "test"]


def build_datasets(
    dataset: str,
    tokenizer: Tokenizer,
    seq_length: int,
    *,
    train_split: str = "train",
    valid_split: str | None = None,
    test_split: str | None = None,
    valid_fraction: float = 0.02,
    packing: bool = True,
    pad_multiple: int = 1,
    num_samples: Sequence[int | None] = (None, None, None),
    seed: int = 1234,
    max_seq_length: int | None = None,
    log: Callable[[str], None] | None = None,
) -> Datasets:
    """Return the train, validation and test datasets of `dataset` (see `load_rows`).

    valid_split: rows to validate on; None: `validation` of an embedded corpus, of any other
        dataset a random `valid_fraction` of the training rows, which they then lose.
    num_samples: lengths of the three; None is one pass, 0 gives no dataset (None). Without a
        `test_split` there is no test dataset.
    max_seq_length: the model's limit. log: receives a line for each dataset, and one warning that
        names all of the data that is not trained on, or is in two datasets.
    Raises ValueError for anything in dataset, tokenizer or lengths that cannot be trained on.
    """
    check_lengths(seq_length, max_seq_length, valid_fraction)
    encoder, warnings = encoder_for(tokenizer), []
    splits = (train_split, valid_split or default_valid_split(dataset), test_split)
    rows = _rows_of(dataset, splits, num_samples, valid_fraction, seed, warnings)
    made = _Made(dataset, encoder, seq_length, packing, pad_multiple, seed, log or (lambda _: None))
    datasets = (
        made.dataset_of("train", rows[0], num_samples[0]),
        made.dataset_of("valid", rows[1], num_samples[1]),
        made.dataset_of("test", rows[2], num_samples[2]),
    )
    made.warn(warnings)
    return datasets


def _rows_of(
    dataset: str,
    splits: tuple[str, str | None, str | None],
    num_samples: Sequence[int | None],
    valid_fraction: float,
    seed: int,
    warnings: list[str],
) -> tuple[Rows, Rows | None, Rows | None]:
    """Return the rows of the three datasets, and add to warnings if two have some in common."""
    train_split, valid_split, test_split = splits
    _, num_valid, num_test = num_samples
    rows, valid_rows = load_rows(dataset, train_split), None
    if valid_split and num_valid != 0:
        valid_rows = load_rows(dataset, valid_split)
        if num_shared := valid_rows.num_shared(rows):
            warnings.append(f"{num_shared} of {len(valid_rows)} validation rows are trained on too")
    elif num_valid != 0:
        rows, valid_rows = hold_out(rows, valid_fraction, seed)
    test_rows = load_rows(dataset, test_split) if test_split and num_test != 0 else None
    return rows, valid_rows, test_rows


@dataclass(frozen=True, slots=True)
class _Made:
    """What the three datasets are made with, and what of their rows nothing is made of."""

    name: str
    encoder: Encoder
    seq_length: int
    packing: bool
    pad_multiple: int
    seed: int
    log: Callable[[str], None]
    unused: set[str] = field(default_factory=set)

    def dataset_of(
        self, split: SplitName, rows: Rows | None, num_samples: int | None
    ) -> PackedDataset | None:
        """Encode and pack rows, and log what they are; None for no rows or no samples."""
        if rows is None or num_samples == 0:
            return None
        schema = schema_of(rows, self.name)
        with Progress(f"encoding the {split} data", len(rows), "rows") as progress:
            encoded = encode_rows(
                rows, schema, self.encoder, self.seq_length, self.unused, progress.add
            )
            examples = gather_examples(encoded, self.name)
        built = PackedDataset(
            examples,
            self.seq_length,
            self.encoder.pad_id,
            packing=self.packing,
            pad_multiple=self.pad_multiple,
            num_samples=num_samples,
            shuffle=split == "train",
            seed=self.seed,
            split_name=split,
        )
        self.log(describe(built))
        return built

    def warn(self, warnings: list[str]) -> None:
        """Log these warnings, and what of the data is not trained on, as one line."""
        found = list(warnings)
        if self.unused:
            found.append(f"nothing is made of {sorted(self.unused)}")
        if left_out := files_left_out(self.name):
            found.append(f"not read: {left_out}")
        found += [f"{number} {note}" for note, number in self.encoder.notes.items()]
        if found:
            self.log(f"WARNING: dataset {self.name}: {'; '.join(found)}")


def check_dataset(
    dataset: str,
    tokenizer: Tokenizer,
    seq_length: int,
    *,
    train_split: str = "train",
    valid_split: str | None = None,
    test_split: str | None = None,
    valid_fraction: float = 0.02,
    max_seq_length: int | None = None,
    validates: bool = False,
) -> None:
    """Raise what `build_datasets` would, by reading every row and encoding up to a trainable one.

    What only encoding can find behind that row, such as a chat that its template refuses, is left.
    validates: training rows are held out where there is no `valid_split`.
    """
    check_lengths(seq_length, max_seq_length, valid_fraction)
    encoder = encoder_for(tokenizer)
    for split in filter(None, (train_split, valid_split, test_split)):
        rows = load_rows(dataset, split)
        schema = schema_of(rows, dataset)
        with Progress(f"reading {dataset}", len(rows), "rows") as progress:
            for _ in read_rows(rows, schema):
                progress.add()
        encoded = encode_rows(rows, schema, encoder, seq_length)
        if not any(any(example.tokens.trained[1:]) for example in encoded):
            gather_examples(encode_rows(rows, schema, encoder, seq_length), dataset)
        if validates and not valid_split and split == train_split:
            hold_out(rows, valid_fraction, seed=0)


def check_lengths(seq_length: int, max_seq_length: int | None, valid_fraction: float) -> None:
    """Raise ValueError for a sequence length or a held-out share that cannot be."""
    if seq_length < 1:
        raise ValueError(f"seq_length {seq_length} is not positive: set --seq-length")
    if max_seq_length is not None and seq_length > max_seq_length:
        raise ValueError(
            f"seq_length {seq_length} is longer than the model's {max_seq_length} positions: "
            "lower --seq-length or raise --max-position-embeddings"
        )
    if not 0 < valid_fraction < 1:
        raise ValueError(
            f"dataset_valid_fraction {valid_fraction} is not between 0 and 1: use 0.02, or "
            "--eval-iters 0 for no validation"
        )


def default_valid_split(dataset: str) -> str | None:
    """Return the validation split that an embedded corpus brings."""
    return "validation" if dataset in EMBEDDED else None


def describe(dataset: PackedDataset) -> str:
    """Return one line on what a dataset holds."""
    examples = dataset.examples
    line = (
        f"{dataset.split_name} data: {len(examples.lengths)} examples, "
        f"{int(examples.trained.sum())} trained tokens of {len(examples.ids)}, "
        f"{len(dataset.rows)} rows of {dataset.seq_length} ({dataset.fill:.1%} full), "
        f"read {len(dataset) / len(dataset.rows):.3g} times"
    )
    if examples.num_cut:
        line += (
            f"; {examples.num_cut} examples cut to --seq-length, {examples.num_lost} tokens to "
            f"train on lost in them, {examples.num_beyond} of them left out, they lost all"
        )
    if examples.num_unanswered:
        line += f"; {examples.num_unanswered} left out, they have no answer to train on"
    return line
