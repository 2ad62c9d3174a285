"""Files that others wrote: plain ones alone are opened, and JSON is read within bounds."""

import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

# Of JSON, far above all that is known: the index of a model with 200,000 tensors has 20 MB.
MAX_JSON_BYTES = 32 * 2**20
MAX_DEPTH = 64
# A file of holes costs its maker nothing and its readers hours; no file system packs numbers so.
_LARGE, _MAX_HOLES = 2**30, 1000
# As many as a float can have.
MAX_DIGITS = 300

# Also of a text that is never closed, so that each character is looked at once.
_JSON_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "pipe",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFSOCK: "socket",
}


def check_plain(path: Path, *, inside: Path | None = None) -> None:
    """Raise ValueError where a path is no plain file, or a link that leads out of a directory.

    inside: the directory; None where the user named the file itself. The links of Hugging Face's
    cache, from snapshots/X to blobs/Y, lead out of nothing. FileNotFoundError is left as it is.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ValueError(f"{path} is a link to what is not there: copy the file") from None
        raise FileNotFoundError(str(path)) from None
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} is a {_KINDS.get(kind, 'special file')}, expected a plain file")
    if status.st_size > _LARGE and status.st_blocks * 512 * _MAX_HOLES < status.st_size:
        raise ValueError(f"{path} is {status.st_size:,} bytes of nothing: copy the file again")
    if inside is not None and path.is_symlink():
        _check_link(path, inside)


def _check_link(path: Path, inside: Path) -> None:
    target, root = path.resolve(), inside.resolve()
    places = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            places.append(parent.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in places):
        raise ValueError(
            f"{path} is a link that leads out of its directory, to {target}: copy the file"
        )


def open_plain(path: Path, *, inside: Path | None = None) -> BufferedReader:
    """Open a plain file to read its bytes; see `check_plain`."""
    check_plain(path, inside=inside)
    try:
        # It may have become a pipe meanwhile, which would be waited for.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} is no plain file any more")
    return file


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file of a directory.

    Raises ValueError, by the file's name, where it is missing, no plain file, or no such object.
    """
    try:
        with open_plain(path, inside=path.parent) as file:
            value = parse_json(file.read(max_bytes + 1), max_bytes=max_bytes)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is {path.parent} the right directory?") from None
    except NotJSONError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or write it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


class NotJSONError(ValueError):
    """What is wrong with a text that should be JSON."""


def parse_json(data: bytes | str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value of a JSON text in UTF-8, without or with a byte order mark.

    Raises NotJSONError for all that is not JSON, for a key that an object has twice, and for what
    is longer, deeper or of more digits than anything that is known.
    """
    if len(data) > max_bytes:
        raise NotJSONError(f"it has more than {max_bytes:,} bytes")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise NotJSONError(f"{error.msg}: {place}") from None
    except UnicodeDecodeError as error:
        raise NotJSONError(f"it is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise NotJSONError("it has one half of a character") from None
    return value


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in re.finditer(r"[][{}]", _JSON_TEXT.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise NotJSONError(f"it is nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise NotJSONError(f"an object has the key {twice!r:.100} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise NotJSONError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
