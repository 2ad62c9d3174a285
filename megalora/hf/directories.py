"""Directories written whole or not at all, which replace nothing but what megalora wrote."""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from megalora.checkpoint.durable import sync
from megalora.checkpoint.owner import Owner
from megalora.hf.signals import undisturbed
from megalora.hf.written import read_manifest, refuse_strangers, remove_written, write_manifest

# What a command reads, by what its user calls it; None where it reads no such thing.
Inputs = Mapping[str, str | os.PathLike[str] | None]


def check_place(
    target: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Inputs | None = None,
    name: str = "output",
) -> Path:
    """Return the real path of a directory to write; ValueError where it must not be written.

    name: what the user calls it. A link to a directory is followed. Refused are an input, what is
    above or below one, the working directory, home and `/`; and a directory that is not empty,
    unless it is to be overwritten and megalora wrote all that it holds.
    """
    shown = f"{name} {os.fspath(target)!r}"
    path = Path(os.path.realpath(target))
    try:
        _refuse_places(shown, path, is_link=os.path.islink(target))
        for what, source in (inputs or {}).items():
            if source is not None and (relation := relation_of(path, source)):
                raise ValueError(
                    f"{shown} is {relation} {what} {os.fspath(source)!r}: give a directory apart "
                    "from it"
                )
        if path.is_dir():
            _refuse_content(shown, path, overwrite=overwrite)
    except OSError as error:
        raise ValueError(f"{shown}: {error.filename} cannot be read: {error.strerror}") from error
    return path


def _refuse_places(shown: str, path: Path, *, is_link: bool) -> None:
    if is_link and not path.exists():
        raise ValueError(f"{shown} is a link to {path}, which does not exist: make that directory")
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            where = "is a file" if part == path else f"is below {part}, which is a file"
            raise ValueError(f"{shown} {where}: give another directory")
    places = {
        "the root of the file system": os.sep,
        "your home directory": os.path.expanduser("~"),
        "the working directory": os.curdir,
    }
    for what, place in places.items():
        if _is_same(path, Path(place)):
            raise ValueError(f"{shown} is {what}: give a directory of its own")
    if path.is_mount():
        raise ValueError(f"{shown} is a mount point, which cannot be replaced: give one inside it")


def _refuse_content(shown: str, directory: Path, *, overwrite: bool) -> None:
    if not overwrite and any(directory.iterdir()):
        raise ValueError(f"{shown} is not empty: give another directory or --overwrite")
    refuse_strangers(shown, directory, read_manifest(directory))


def relation_of(target: str | os.PathLike[str], source: str | os.PathLike[str]) -> str:
    """Say how a directory to write would touch another: `also`, `inside`, `above`, or not at all.

    By what they are, not only by names: so a mount or another spelling is found.
    """
    path, other = (Path(os.path.realpath(each)) for each in (target, source))
    if _is_same(path, other):
        return "also"
    if any(_is_same(parent, other) for parent in path.parents):
        return "inside"
    return "above" if any(_is_same(path, parent) for parent in other.parents) else ""


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        # One is not there: their real paths tell.
        return one == other


class WholeDirectory:
    """A directory that is filled beside its place, and gets it when it is complete.

    filling: where to write. What a run that was killed left there of its own is removed first.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        inputs: Inputs | None = None,
        name: str = "output",
    ) -> None:
        self._shown, self._overwrite = f"{name} {os.fspath(target)!r}", overwrite
        recover(Path(os.path.realpath(target)))
        self.path = check_place(target, overwrite=overwrite, inputs=inputs, name=name)
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        self.filling = self._beside("new")

    def begin(self) -> Path:
        """Make the directory to fill, and return it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.filling.mkdir()
        return self.filling

    def finish(self) -> None:
        """Give the filled directory its place, once all of it is on the disk."""
        write_manifest(self.filling)
        for path in (*self.filling.rglob("*"), self.filling):
            sync(path)
        with undisturbed():
            old = self._put_aside()
            try:
                os.rename(self.filling, self.path)
            except OSError:
                if old is not None:
                    os.rename(old, self.path)
                raise
            with suppress(OSError):
                sync(self.path.parent)
            if old is not None and not remove_written(old, read_manifest(old)):
                warnings.warn(f"{old} has files that came into {self.path} meanwhile", stacklevel=2)

    def drop(self) -> None:
        """Remove what was filled, and the parents made for it."""
        with undisturbed():
            shutil.rmtree(self.filling, ignore_errors=True)
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Raise ValueError, which tells where and why, for a write that fails."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            file = Path(os.fsdecode(error.filename or self.filling / "file"))
            if file == self.filling:
                reason = f"{file.parent}: {reason}"
            elif not file.is_relative_to(self.filling):
                reason = f"{file}: {reason}"
            raise ValueError(
                f"{self._shown} cannot be written: {reason}: nothing was written to it"
            ) from error

    def _put_aside(self) -> Path | None:
        """Give an earlier directory another name, once nothing of others is in it."""
        if not self.path.exists():
            return None
        old = self._beside("old")
        os.rename(self.path, old)
        try:
            _refuse_content(self._shown, old, overwrite=self._overwrite)
        except BaseException:
            os.rename(old, self.path)
            raise
        return old

    def _beside(self, what: str) -> Path:
        owner = Owner.this()
        mark = f"{what}-{owner.machine}-{owner.pid}-{owner.start}-{secrets.token_hex(4)}"
        return self.path.with_name(f".{self.path.name}.megalora-{mark}")


@contextmanager
def whole_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False, inputs: Inputs | None = None
) -> Iterator[Path]:
    """Give a directory to fill that appears as `target` at the end, or not at all.

    Raises ValueError where `check_place` does, and for a write that fails.
    """
    whole = WholeDirectory(target, overwrite=overwrite, inputs=inputs)
    try:
        with whole.telling():
            yield whole.begin()
            whole.finish()
    except BaseException:
        whole.drop()
        raise


def recover(path: Path) -> None:
    """Remove what killed runs on this machine left beside a directory; put back what they moved."""
    pattern = re.compile(
        rf"\.{re.escape(path.name)}\.megalora-(new|old)-([0-9a-f]+)-(\d+)-(-?\d+)-[0-9a-f]+"
    )
    with suppress(OSError):
        for beside in sorted(path.parent.iterdir()):
            found = pattern.fullmatch(beside.name)
            if found and not beside.is_symlink() and _owner(found).is_gone():
                _clear(beside, found[1], path)


def _owner(found: re.Match[str]) -> Owner:
    return Owner(found[2], int(found[3]), int(found[4]))


def _clear(beside: Path, kind: str, path: Path) -> None:
    if kind == "new":
        shutil.rmtree(beside, ignore_errors=True)
    elif path.exists():
        remove_written(beside, read_manifest(beside))
    else:
        os.rename(beside, path)
