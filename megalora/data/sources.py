"""Rows with their place: JSON lines as they stand in the file, and tables of other libraries."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from megalora.data.chats import Row
from megalora.reading import MAX_JSON_BYTES, NotJSONError, open_plain, parse_json

# Of one list, which is held in memory; JSON lines may be as long as the disk.
_MAX_LIST_BYTES = 2 * 2**30


class Source(Protocol):
    """Rows of one file, or of one split."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def where(self, number: int) -> str:
        """Return the place of a row, to be found by a reader."""
        ...


class JsonLines:
    """The rows of a file with one JSON object on each line, parsed where they are asked for.

    No table in between: that would fill the keys which other rows have with nulls, read text that
    looks like a date as one, and not know the line of a broken row.
    """

    def __init__(self, path: str) -> None:
        """Find the lines of a file; blank ones are no rows."""
        self.name = path
        self._starts, self._lines = array("q"), array("q")
        self._file = open_data(path)
        start, number = 0, 0
        while line := self._file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if len(line) > MAX_JSON_BYTES:
                raise ValueError(
                    f"dataset {path} line {number} has more than {MAX_JSON_BYTES:,} bytes: it is "
                    "no JSON lines, or a row to be cut"
                )
            if line.strip():
                self._starts.append(start)
                self._lines.append(number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Row:
        self._file.seek(self._starts[number])
        line = self._file.readline()
        try:
            return _object(parse_json(line.strip()))
        except NotJSONError as error:
            raise ValueError(
                f"dataset {self.where(number)}: no JSON object ({_cause(error)}): mend the line or "
                "leave it out; a json file may also be one list of objects"
            ) from error

    def where(self, number: int) -> str:
        """Return file and line, the first is 1."""
        return f"{self.name} line {self._lines[number]}"


class Table:
    """Rows of a list, or of a table of the `datasets` library."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def where(self, number: int) -> str:
        """Return file or dataset and row, the first is 0."""
        return f"{self.name} row {number} (the first is 0)"


class ArrowTable(Table):
    """Rows of Arrow's tables, which have null in every key that any row of the table has."""

    def __getitem__(self, number: int) -> Row:
        return {key: _without_nulls(value) for key, value in self._rows[number].items()}


class Rows(Sequence[Row]):
    """Rows of some sources, one source after another, or a selection of them."""

    def __init__(
        self, sources: Sequence[Source], numbers: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Take the rows of `numbers` (default: all), which count on from source to source."""
        self.sources = sources
        self._ends = list(accumulate(len(source) for source in sources))
        self.numbers = range(self._ends[-1]) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        if index >= len(self):
            raise IndexError(index)
        source, number = self._find(index)
        return source[number]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """Return the place of a row in its source."""
        source, number = self._find(index)
        return source.where(number)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """Return some of the rows, in the order of `indices`."""
        return Rows(self.sources, np.asarray(self.numbers, np.int64)[np.asarray(indices, np.int64)])

    def num_shared(self, other: "Rows") -> int:
        """Return how many of these rows `other` has too."""
        if [s.name for s in self.sources] != [s.name for s in other.sources]:
            return 0
        return len(np.intersect1d(np.asarray(self.numbers), np.asarray(other.numbers)))

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(self.numbers[index])
        place = bisect_right(self._ends, number)
        return self.sources[place], number - (self._ends[place - 1] if place else 0)


def open_data(path: str) -> BufferedReader:
    """Open a file of data, which may be a link but must be a plain file."""
    try:
        return open_plain(Path(path))
    except ValueError as error:
        raise ValueError(f"dataset {error}") from None
    except FileNotFoundError:
        raise ValueError(f"dataset {path} is not there: check the path") from None


def json_source(path: str) -> Source:
    """Return the rows of a json file: objects on lines, or one list of objects.

    Raises ValueError, with its place, where a list is broken; lines are read later.
    """
    with open_data(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return JsonLines(path)
    try:
        with open_data(path) as file:
            rows = parse_json(file.read(_MAX_LIST_BYTES + 1), max_bytes=_MAX_LIST_BYTES)
    except NotJSONError as error:
        raise ValueError(f"dataset {path} is no list of JSON objects: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"dataset {path} row {number}: a {type(row).__name__}, no object")
    return Table(path, rows)


def _object(value: object) -> Row:
    if not isinstance(value, dict):
        raise NotJSONError(f"it is a {type(value).__name__}")
    return value


def _cause(error: NotJSONError) -> str:
    """Return what is wrong in a line, without json's own count of lines."""
    return str(error).replace(": line 1,", ",")


def _without_nulls(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
