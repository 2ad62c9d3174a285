"""Versions of an adapter as directories beside each other: whole or not there, the newest kept."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from megalora.hf.directories import recover, whole_directory
from megalora.hf.written import read_manifest, refuse_strangers, remove_written

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGITS = 5


class VersionedDirectory:
    """A folder in which each version of an adapter is a directory, as `NAME-v00012`.

    folder: on a file system that the server reads too. name: of letters, digits, `.`, `_` and `-`.
    keep: how many of the newest versions stay; the server reads the newest again where it made room
    for others meanwhile. One process writes to a name at a time.
    """

    def __init__(self, folder: str | Path, name: str = "policy", *, keep: int = 2) -> None:
        """Raise ValueError for a name that is none, or where nothing would be kept."""
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"adapter name is {name!r:.120}: use letters, digits, `.`, `_` and `-`, the first "
                "of them a letter or digit, 100 at most"
            )
        if keep < 1:
            raise ValueError(f"keep is {keep}: the server reads the newest version, keep 1 or more")
        self.folder, self.name, self.keep = Path(folder).resolve(), name, keep

    def path(self, version: int) -> Path:
        """Return where a version stands."""
        return self.folder / f"{self.name}-v{version:0{_DIGITS}d}"

    def versions(self) -> list[int]:
        """Return the versions that are there, whoever wrote them, the newest last."""
        pattern = re.compile(rf"{re.escape(self.name)}-v(\d{{{_DIGITS},}})")
        if not self.folder.is_dir():
            return []
        found = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def next_version(self) -> int:
        """Return the version after the newest that is there; 1 where there is none."""
        return max(self.versions(), default=0) + 1

    def write(self, version: int, fill: Callable[[Path], None]) -> Path:
        """Make a version, whole or not at all, by a function that fills a directory; return it.

        Raises ValueError where something is there already, and for a write that fails. What killed
        runs left of their versions is removed first.
        """
        self._recover()
        path = self.path(version)
        with whole_directory(path) as filling:
            fill(filling)
        return path

    def prune(self) -> list[Path]:
        """Remove all versions but the newest `keep`, where megalora wrote all that is in them."""
        removed = []
        for version in self.versions()[: -self.keep]:
            path = self.path(version)
            written = {} if path.is_symlink() else read_manifest(path)
            try:
                refuse_strangers(f"old version {path}", path, written)
            except (OSError, ValueError) as error:
                warnings.warn(f"{error}: it stays", stacklevel=2)
                continue
            # An empty directory has no manifest, so it is not ours.
            if written and remove_written(path, written):
                removed.append(path)
        return removed

    def _recover(self) -> None:
        beside = re.compile(rf"\.({re.escape(self.name)}-v\d+)\.megalora-(new|old)-.+")
        if self.folder.is_dir():
            found = {m[1] for path in self.folder.iterdir() if (m := beside.fullmatch(path.name))}
            for target in sorted(found):
                recover(self.folder / target)
