"""What in a directory megalora wrote, by a manifest in it: nothing else is ever deleted."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath

from megalora.reading import parse_json

MANIFEST = "megalora.json"
_VERSION = 1
# The checkpoint of a large model has some thousand files.
_MAX_BYTES = 1 << 24
_NUM_NAMED = 3


def write_manifest(directory: Path) -> None:
    """Write down the names and sizes of all files that a directory holds."""
    files = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    content = {"version": _VERSION, "files": files}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, int]:
    """Return the sizes of the files that megalora wrote, by name; none where nothing says so."""
    path = directory / MANIFEST
    try:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_BYTES:
            content = parse_json(path.read_bytes(), max_bytes=_MAX_BYTES)
            files, is_known = content["files"], content["version"] == _VERSION
            if is_known and all(_is_inside(name) and type(files[name]) is int for name in files):
                return {**files, MANIFEST: status.st_size}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def refuse_strangers(shown: object, directory: Path, written: Mapping[str, int]) -> None:
    """Raise ValueError where a directory holds what megalora did not write, naming it.

    shown: what its user calls the directory. written: of `read_manifest`.
    """
    folders = {folder.as_posix() for folder in _folders(written)}
    found = list(islice(_strangers(directory, "", written, folders), _NUM_NAMED + 1))
    if found:
        # A name may have anything in it.
        names = ", ".join(repr(name)[1:-1] for name in found[:_NUM_NAMED])
        raise ValueError(
            f"{shown} holds {names}{' and more' if len(found) > _NUM_NAMED else ''}, which "
            "megalora did not write: give another directory, or remove it yourself"
        )


def remove_written(directory: Path, written: Mapping[str, int]) -> bool:
    """Remove the files of a manifest, and folders that are empty then; say if nothing is left."""
    for folder in sorted(_folders(written), key=lambda one: len(one.parts), reverse=True):
        own = [path.name for path in map(PurePosixPath, written) if path.parent == folder]
        with contextlib.suppress(OSError):
            _unlink(directory / folder, own)
            (directory / folder).rmdir()
    return not directory.exists()


def _strangers(
    directory: Path, folder: str, written: Mapping[str, int], folders: set[str]
) -> Iterator[str]:
    with os.scandir(directory / folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name, status = f"{folder}{entry.name}", entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode) and name in folders:
            yield from _strangers(directory, f"{name}/", written, folders)
        elif not stat.S_ISREG(status.st_mode) or name not in written:
            yield name
        elif status.st_size != written[name]:
            yield f"{name} (of another size)"


def _unlink(folder: Path, names: list[str]) -> None:
    # Never through a link that has come into the folder's place.
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=opened)
    finally:
        os.close(opened)


def _folders(written: Mapping[str, int]) -> set[PurePosixPath]:
    """Return the folders of a manifest's files, `.` among them."""
    return {
        PurePosixPath(),
        *(folder for name in written for folder in PurePosixPath(name).parents),
    }


def _is_inside(name: str) -> bool:
    """Say whether a name is that of a file in the directory or in a folder of it."""
    path = PurePosixPath(name)
    return str(path) == name != "." and not path.is_absolute() and ".." not in path.parts
