"""Rows of a dataset by name or path: embedded corpora, local files, Hugging Face datasets."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalora import corpus

type Row = Mapping[str, Any]

EMBEDDED = {"stdlib-text": corpus.text_rows, "stdlib-docstrings": corpus.docstring_rows}
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# In order of preference, for datasets that have several.
SCHEMAS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}


def load_rows(dataset: str, split: str = "train") -> Sequence[Row]:
    """Return the rows of one split of `dataset`.

    dataset: an embedded corpus (`stdlib-text`, `stdlib-docstrings`), a json, jsonl or parquet file,
        a folder of one of these kinds (their only split is train), or a name on the Hugging Face
        hub, all read through the `datasets` library.
    split: a split's name; `datasets` also takes slices, as in `train[:10%]`.
    Raises ValueError where there is no such dataset or split, or where it has no rows.
    """
    if dataset in EMBEDDED:
        return EMBEDDED[dataset](split)
    return _load(dataset, split)


def schema_of(rows: Sequence[Row], dataset: str) -> str:
    """Return what rows hold: `messages`, `completion` (with `prompt`) or `text`.

    Raises ValueError, listing the columns there are, where none of these is complete.
    """
    columns = list(rows[0])
    for schema, needed in SCHEMAS.items():
        if set(needed) <= set(columns):
            return schema
    raise ValueError(
        f"dataset {dataset} has the columns {columns}, none of them usable: rename them to "
        "`messages` (chat), `prompt` and `completion`, or `text`"
    )


def _load(dataset: str, split: str) -> Any:
    path = Path(dataset)
    if path.is_dir():
        files = sorted(str(p) for p in path.iterdir() if p.suffix in FILE_FORMATS)
        return _load_files(dataset, files, split)
    if path.is_file():
        return _load_files(dataset, [dataset], split)
    if path.suffix in FILE_FORMATS or dataset.startswith((".", "~", os.sep)):
        raise ValueError(f"dataset {dataset} is not there: check the path")
    return _load_from_hub(dataset, split)


def _load_files(dataset: str, files: list[str], split: str) -> Any:
    formats = {FILE_FORMATS.get(Path(file).suffix) for file in files}
    if len(formats) != 1 or None in formats:
        raise ValueError(
            f"dataset {dataset} is not files of one kind: give {', '.join(FILE_FORMATS)}, "
            "or a folder with files of one of these kinds"
        )
    for file in files:
        if Path(file).stat().st_size == 0:
            raise ValueError(f"dataset {file} is empty: give a file with rows")
    return _call_datasets(dataset, split, path=formats.pop(), data_files=files)


def _load_from_hub(dataset: str, split: str) -> Any:
    name, _, config = dataset.partition(":")
    return _call_datasets(dataset, split, path=name, name=config or None)


def _call_datasets(dataset: str, split: str, **source: Any) -> Any:
    from datasets import load_dataset  # costs seconds, and the embedded corpora need none of it

    try:
        return load_dataset(**source, split=split)
    except Exception as error:  # the library's errors share no base class
        raise ValueError(
            f"dataset {dataset} with dataset_split {split!r} cannot be read "
            f"({type(error).__name__}: {error}): give an existing file, folder or hub name and "
            "a split that it has"
        ) from error
