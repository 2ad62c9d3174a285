"""A directory of checkpoints: its names, its tracker file, and the checksums of its files.

Megatron writes in this order, and so does whatever saves here:

    iter_0000003/*.distcp, .metadata    tensors and other objects, and where each is
    iter_0000003/metadata.json          the format: all tensors are written
    iter_0000003/integrity.json         the manifest: SHA-256 of every file above
    latest_checkpointed_iteration.txt   the tracker file: 3

A release is a checkpoint without an iteration, in `release`; the tracker file holds that word.
Megatron takes its weights alone and trains from iteration 0. Everyone who reads a checkpoint asks
here which one it is, and whether its files are those that were saved.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalora.checkpoint.durable import write_whole
from megalora.reading import NotJSONError, check_plain, open_plain, parse_json, read_json

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Literal["release"] = "release"
METADATA = ".metadata"
FORMAT = "metadata.json"
MANIFEST = "integrity.json"
# What a reader would take for a part of the checkpoint; others may leave notes beside it.
TENSORS = ".distcp"
_PARTS = (TENSORS, ".pt", METADATA, FORMAT)

# Of a tracker file, which holds one number.
_MAX_TRACKER_BYTES = 100
_MAX_ITERATION_DIGITS = 18
# Of a manifest: two files for each of 40,000 ranks.
_MAX_MANIFEST_BYTES = 8 * 2**20

# The name of a checkpoint: its iteration, or that it has none.
Iteration = int | Literal["release"]
# Holds files of a directory against their checksums; says by name what is wrong with them.
type Sums = Callable[[Path, Mapping[str, str]], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Tracker:
    """What a tracker file says: the newest checkpoint, or what is wrong with the file."""

    newest: Iteration | None
    defect: str | None = None


def iteration_directory(root: Path, iteration: Iteration) -> Path:
    """Return Megatron's directory of a checkpoint."""
    return root / (RELEASE if iteration == RELEASE else f"iter_{iteration:07d}")


def list_iterations(root: Path) -> list[Iteration]:
    """Return the checkpoints that have a directory, newest first, a release last."""
    names = [path.name.removeprefix("iter_") for path in root.glob("iter_*")]
    numbers = sorted({int(name) for name in names if _is_number(name)}, reverse=True)
    return [each for each in (*numbers, RELEASE) if iteration_directory(root, each).is_dir()]


def read_tracker(root: Path) -> Tracker:
    """Read the tracker file; without one nothing is the newest, and nothing is wrong."""
    path = root / TRACKER
    try:
        with open_plain(path, inside=root) as file:
            text = file.read(_MAX_TRACKER_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return Tracker(None)
    except ValueError as error:
        return Tracker(None, str(error))
    except OSError as error:
        return Tracker(None, f"{path} cannot be read ({error.strerror})")
    if text == RELEASE:
        return Tracker(RELEASE)
    if _is_number(text):
        return Tracker(int(text))
    return Tracker(None, f"{path} holds {text[:20]!r} instead of an iteration or '{RELEASE}'")


def read_iteration(root: Path) -> int | None:
    """Return the iteration that the tracker file names, None where it names none."""
    newest = read_tracker(root).newest
    return newest if isinstance(newest, int) else None


def write_tracker(root: Path, newest: Iteration) -> None:
    """Write the tracker file, whole or not at all."""
    write_whole(root / TRACKER, str(newest))


def find_directory(path: Path) -> Path:
    """Return the directory of the checkpoint that a directory's tracker file names.

    path: a directory of checkpoints; or that of one checkpoint, which is returned. Raises
    ValueError where the tracker file is damaged or missing, or names what is not there.
    """
    tracker, there = read_tracker(path), list_iterations(path)
    directory = path if tracker.newest is None else iteration_directory(path, tracker.newest)
    problem = tracker.defect
    if tracker == Tracker(None) and there:
        problem = f"{path} has no {TRACKER}"
    elif directory != path and not directory.is_dir():
        problem = f"{path / TRACKER} names {directory.name}, which is missing"
    if problem is None:
        return directory
    raise ValueError(f"{problem}: {choice_of(there)}")


def base_directory(root: Path) -> Path:
    """Return the directory of the checkpoint that a base is read from.

    root: of --pretrained-checkpoint. Raises ValueError where it holds no checkpoint of Megatron's.
    """
    directory = find_directory(root)
    if directory != root:
        return directory
    given = f"pretrained_checkpoint {str(root)!r}"
    if (root / "config.json").is_file():
        raise ValueError(
            f"{given} has config.json and no checkpoint of Megatron's: give it by --hf-model"
        )
    raise ValueError(
        f"{given} has no {TRACKER}: give the directory that a Megatron run saved its checkpoints in"
    )


def choice_of(there: Sequence[Iteration]) -> str:
    """Say what to write into a tracker file, where it names no checkpoint that is there."""
    return f"write {' or '.join(map(str, there))} into it" if there else "copy it again"


def check_sums(directory: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Hold files against their SHA-256, some at once; return a text for each that is another."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda name: _damage(directory / name, digests[name]), digests)
        return {name: damage for name, damage in zip(digests, found, strict=True) if damage}


def verify(directory: Path, sums: Sums = check_sums) -> None:
    """Raise ValueError where a checkpoint's files are not those that were saved, naming them.

    directory: of one checkpoint. Without a manifest nothing is claimed and nothing is checked:
    plain Megatron writes one only with --verify-integrity.
    """
    if found := find_damage(directory, sums):
        root = directory.parent
        names = [iteration_directory(root, each).name for each in list_iterations(root)]
        others = [name for name in names if name != directory.name]
        raise ValueError(
            f"checkpoint {directory} is damaged: {', '.join(found)}: copy it again from where it "
            f"is intact, or use another{f' ({", ".join(others)})' if others else ''}"
        )


def find_damage(directory: Path, sums: Sums = check_sums) -> list[str]:
    """Return what contradicts a checkpoint's manifest, a text for each file that does."""
    try:
        digests = _read_manifest(directory)
        there = set(os.listdir(directory))
        named = there & (digests or {}).keys()
        extra = [name for name in there if name.endswith(_PARTS) and name not in named]
        # What is named is looked at, before it is read, by whoever sums it up.
        plain = [directory / name for name in {*extra, *({FORMAT} & there)}]
        found = [problem for problem in map(_problem, plain) if problem]
    except ValueError as error:
        return [str(error)]
    except OSError as error:
        return [f"{directory} cannot be read ({error.strerror})"]
    if found or digests is None:
        return _first(found)
    missing = [f"{name} is missing" for name in digests if name not in there]
    damaged = sums(directory, {name: digests[name] for name in named})
    unnamed = [f"{name} is not in {MANIFEST}" for name in extra]
    return _first([*missing, *damaged.values(), *unnamed])


def _first(found: list[str], limit: int = 5) -> list[str]:
    """Return some of the problems, and how many more there are."""
    shown, more = sorted(found)[:limit], len(found) - limit
    return [*shown, f"and {more} more"] if more > 0 else shown


def _problem(part: Path) -> str | None:
    """Say what is wrong with a part of a checkpoint before anything reads it."""
    try:
        # Megatron reads the format whole, and all other parts where they say that data is.
        _ = read_json(part) if part.name == FORMAT else check_plain(part)
    except ValueError as error:
        return str(error)
    except FileNotFoundError:
        return f"{part.name} is missing"
    return None


def has_manifest(directory: Path) -> bool:
    """Say whether checksums were saved with a checkpoint."""
    return os.path.lexists(directory / MANIFEST)


def _read_manifest(directory: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file by name, None where there is no manifest."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        with open_plain(path, inside=directory) as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
        manifest = parse_json(data, max_bytes=_MAX_MANIFEST_BYTES)
    except NotJSONError as error:
        raise ValueError(f"{MANIFEST} is damaged, it holds no checksums ({error})") from None
    digests = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(digests, dict):
        raise ValueError(f"{MANIFEST} is damaged, it holds no checksums")
    plain = all("/" not in n and n != "." and isinstance(digests[n], str) for n in digests)
    if not plain or manifest.get("algorithm") != "sha256":
        raise ValueError(f"{MANIFEST} is damaged, it has no SHA-256 of files of its own directory")
    return digests


def _damage(path: Path, digest: str) -> str | None:
    try:
        # Only a file ends: a manifest could name a device.
        with open_plain(path) as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return f"{path.name} is missing"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if is_same else f"{path.name} does not match its checksum in {MANIFEST}"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_ITERATION_DIGITS
