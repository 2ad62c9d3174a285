"""Rows of a dataset by name or path: embedded corpora, local files, Hugging Face datasets."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalora.data import corpus
from megalora.data.chats import Row
from megalora.data.sources import ArrowTable, Rows, Source, Table, json_source, open_data

EMBEDDED = {"stdlib-text": corpus.text_rows, "stdlib-docstrings": corpus.docstring_rows}
FILE_FORMATS = (".json", ".jsonl", ".parquet")
# In order of preference, for rows that have several.
SCHEMAS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
    "calls": ("query", "answers", "tools"),
    "text": ("text",),
}
_NO_DATA = (".md", ".txt", ".yaml", ".yml", ".lock")


def load_rows(dataset: str, split: str = "train") -> Rows:
    """Return the rows of one split of `dataset`.

    dataset: an embedded corpus (`stdlib-text`, `stdlib-docstrings`), a json, jsonl or parquet file,
        a folder of one of these kinds (their only split is train), or a name on the Hugging Face
        hub, read through the `datasets` library.
    split: a split's name; slices too, as in `train[:10%]`, but of embedded corpora.
    Raises ValueError where there is no such dataset or split, or where it has no rows.
    """
    if dataset in EMBEDDED:
        return Rows([Table(f"{dataset} {split}", EMBEDDED[dataset](split))])
    files = files_of(dataset)
    if not files:
        table = ArrowTable(f"{dataset} {split}", _load_from_hub(dataset, split))
        return _filled(Rows([table]), split, dataset)
    if Path(files[0]).suffix == ".parquet":
        sources: list[Source] = [ArrowTable(file, _load_parquet(file)) for file in files]
    else:
        sources = [json_source(file) for file in files]
    for source in sources:
        if not len(source):
            raise ValueError(f"dataset {source.name} is empty: give a file with rows")
    return _filled(_slice(Rows(sources), split), split, dataset)


def files_of(dataset: str) -> list[str]:
    """Return the local files of a dataset, sorted; none of what is not local.

    Raises ValueError where a path does not exist, or holds files of several kinds or of none.
    """
    path = Path(dataset)
    if path.is_dir():
        files = [str(p) for p in sorted(path.iterdir()) if p.suffix in FILE_FORMATS]
    elif os.path.lexists(path):
        files = [dataset]
    elif path.suffix in FILE_FORMATS or dataset.startswith((".", "~", os.sep)):
        raise ValueError(f"dataset {dataset} is not there: check the path")
    else:
        return []
    suffixes = {Path(file).suffix for file in files}
    if not suffixes or not (suffixes <= {".json", ".jsonl"} or suffixes == {".parquet"}):
        raise ValueError(
            f"dataset {dataset} is not files of one kind: give {', '.join(FILE_FORMATS)}, "
            "or a folder with files of one of these kinds"
        )
    return files


def files_left_out(dataset: str) -> list[str]:
    """Return what a dataset's folder has beside its files, but no documents and hidden files."""
    path = Path(dataset)
    if not path.is_dir():
        return []
    known = {*FILE_FORMATS, *_NO_DATA}
    names = (p for p in path.iterdir() if p.suffix not in known and not p.name.startswith("."))
    return sorted(p.name for p in names)


def schema_of(rows: Sequence[Row], dataset: str) -> str:
    """Return what rows hold: a key of `SCHEMAS`.

    Raises ValueError, listing the columns there are, where none of these is complete.
    """
    first = rows[0]
    filled = {column for column, value in first.items() if value is not None}
    for columns in (filled, set(first)):
        for schema, needed in SCHEMAS.items():
            if set(needed) <= columns:
                return schema
    raise ValueError(
        f"dataset {dataset} has the columns {list(first)}, none of them usable: rename them to "
        "`messages` or `conversations` (chat), `prompt` and `completion`, or `text`"
    )


def _slice(rows: Rows, split: str) -> Rows:
    """Return the rows of a split of local files: `train`, or slices of it."""
    if split == "train":
        return rows
    from datasets import ReadInstruction  # costs seconds

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"dataset_split {split!r} cannot be read ({error}): local files have `train` only, and "
            "slices of it such as train[:10%]"
        ) from error
    return rows.select([index for part in parts for index in range(part.from_, part.to)])


def _filled(rows: Rows, split: str, dataset: str) -> Rows:
    if not len(rows):
        raise ValueError(
            f"dataset_split {split!r} of dataset {dataset} has no rows: give another split or slice"
        )
    return rows


def _load_parquet(file: str) -> Any:
    import pyarrow.parquet

    open_data(file).close()
    try:
        num_rows = pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"dataset {file} is no parquet file: {error}") from error
    # The library takes a table without rows for a split that is not there.
    return _call_datasets(file, "train", path="parquet", data_files=[file]) if num_rows else []


def _load_from_hub(dataset: str, split: str) -> Any:
    name, _, config = dataset.partition(":")
    return _call_datasets(dataset, split, path=name, name=config or None)


def _call_datasets(dataset: str, split: str, **source: Any) -> Any:
    from datasets import load_dataset  # costs seconds, and json needs none of it

    try:
        return load_dataset(**source, split=split)
    except Exception as error:  # the library's errors share no base class
        cause: BaseException = error
        while cause.__cause__ is not None:  # its DatasetGenerationError does not say what is wrong
            cause = cause.__cause__
        raise ValueError(
            f"dataset {dataset} with dataset_split {split!r} cannot be read "
            f"({type(cause).__name__}: {cause}): give an existing file, folder or hub name and "
            "a split that it has"
        ) from error
