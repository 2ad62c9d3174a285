"""Copy the files beside a model's weights: regular ones, and none from outside of its directory."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path


def other_files(source: Path, skip: Callable[[str], bool]) -> dict[str, Path]:
    """Return the regular files of a directory, configuration and tokenizer, but for the skipped.

    By name, each where it really is. A link is followed within the directory, and to the blobs of
    the same repository in Hugging Face's cache; ValueError for one that leads elsewhere. What is
    no file (a folder, pipe, device or socket) is left out.
    """
    root = Path(os.path.realpath(source))
    allowed = [root]
    if root.parent.name == "snapshots":
        # REPOSITORY/snapshots/REVISION has links to ../../blobs.
        allowed.append(root.parent.parent / "blobs")
    found = {}
    for file in sorted(source.iterdir()):
        real = Path(os.path.realpath(file))
        if skip(file.name) or not real.is_file():
            continue
        if not any(real.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{file} is a link to {real}, which is outside of the model's directory: put the "
                "file itself there, or remove the link"
            )
        found[file.name] = real
    return found


def copy_files(files: dict[str, Path], target: Path) -> None:
    """Copy what `other_files` returned, with the modes that new files have."""
    for name, real in files.items():
        # Not through a link or from a pipe that has come there since.
        source = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(source, "rb") as reading:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise ValueError(f"{real} is no regular file any more")
            with (target / name).open("xb") as writing:
                shutil.copyfileobj(reading, writing)
