"""Which checkpoint a run goes on from: the newest intact one, whatever happened while it was saved.

Megatron writes an iteration's tensors first, then its metadata.json, then (asked by
`megalora.checkpoint.save`) integrity.json with the SHA-256 of every file, and the tracker file
latest_checkpointed_iteration.txt last. A save that was killed therefore leaves the tracker on the
checkpoint before, or an empty tracker.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.read import read_description

OnCorrupt = Literal["previous", "stop"]
TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "integrity.json"
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint to load.

    description: what megalora stored with the adapters; None for a checkpoint of a whole model.
    """

    directory: str
    iteration: int
    description: dict[str, Any] | None


def find_on_all_ranks(
    load: str | None, *, step: int | None, on_corrupt: OnCorrupt, warn: Callable[[str], None]
) -> Found | None:
    """Find the checkpoint on rank 0, which alone reads and checks its files, and tell all ranks."""

    def find() -> Found | None:
        return find_checkpoint(load, step=step, on_corrupt=on_corrupt, warn=warn) if load else None

    return on_all_ranks(find, only=0)


def find_checkpoint(
    load: str | Path, *, step: int | None, on_corrupt: OnCorrupt, warn: Callable[[str], None]
) -> Found | None:
    """Return the newest intact checkpoint in a directory, None where it has none yet.

    step: load exactly this iteration. on_corrupt: `previous` takes the checkpoint before a damaged
    one, after a warning that names the damage, and sets the tracker file back to it; `stop` raises
    ValueError. Also raises it where no checkpoint is intact.
    """
    root = Path(load)
    tracked, tracker_defect = _read_tracker(root)
    if tracked == "release":
        return Found(str(root / "release"), 0, read_description(root / "release"))
    candidates = [step] if step else _candidates(root, tracked)
    defects = [tracker_defect] if tracker_defect and not step else []
    for iteration in candidates:
        directory = iteration_directory(root, iteration)
        found, defect = _check(directory, iteration, is_named=iteration in (tracked, step))
        if found is None:
            defects += [f"{directory}: {defect}"] if defect else []
            continue
        if defect is not None:
            warn(f"WARNING: checkpoint {directory} is not verified: {defect}")
        _report(defects, iteration, on_corrupt, warn)
        if iteration not in (tracked, step):
            _write_tracker(root, iteration)
        return found
    if defects and candidates:
        raise ValueError(
            f"load {root} has no intact checkpoint to go on from: {'; '.join(defects)}"
        )
    return None


def iteration_directory(root: Path, iteration: int) -> Path:
    """Return Megatron's directory of an iteration."""
    return root / f"iter_{iteration:07d}"


def damaged_files(directory: Path) -> list[str]:
    """Return what contradicts the manifest of a checkpoint; FileNotFoundError where it has none."""
    text = (directory / MANIFEST).read_bytes()
    try:
        digests: dict[str, str] = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is torn"]

    def check(name: str) -> str | None:
        try:
            is_same = _sha256(directory / name) == digests[name]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if is_same else f"{name} does not match its checksum"

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [damage for damage in pool.map(check, sorted(digests)) if damage]


def read_iteration(root: Path) -> int | None:
    """Return the iteration that the tracker file names, None where there is none."""
    tracked, _ = _read_tracker(root)
    return tracked if isinstance(tracked, int) else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read_tracker(root: Path) -> tuple[int | Literal["release"] | None, str | None]:
    """Return what the tracker file names, and what is wrong with it."""
    try:
        text = (root / TRACKER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None, None
    if text == "release":
        return "release", None
    if text.isascii() and text.isdigit():
        return int(text), None
    return None, f"{root / TRACKER} holds {text[:20]!r} instead of an iteration"


def _candidates(root: Path, tracked: int | Literal["release"] | None) -> list[int]:
    """Return the iterations to try, newest first; none is newer than the tracker file says."""
    names = [path.name.removeprefix("iter_") for path in root.glob("iter_*") if path.is_dir()]
    iterations = {int(name) for name in names if name.isascii() and name.isdigit()}
    if isinstance(tracked, int):
        iterations = {i for i in iterations if i <= tracked} | {tracked}
    return sorted(iterations, reverse=True)


def _check(directory: Path, iteration: int, *, is_named: bool) -> tuple[Found | None, str | None]:
    """Return the checkpoint where it is intact, and what is wrong or unknown about it.

    Neither is returned for what a killed save left, which is nothing to warn of. is_named: the
    tracker file or the user names it, so Megatron finished it, and a missing manifest only means
    that something other than megalora saved it.
    """
    if not directory.is_dir():
        return None, "the directory is missing"
    warning = None
    try:
        damage = damaged_files(directory)
    except FileNotFoundError:
        if not is_named:
            return None, None
        damage, warning = [], f"it has no {MANIFEST}"
    if damage:
        return None, ", ".join(damage)
    try:
        description = read_description(directory)
    except ValueError as error:
        return None, str(error)
    return Found(str(directory), iteration, description), warning if description else None


def _report(
    defects: list[str], iteration: int, on_corrupt: OnCorrupt, warn: Callable[[str], None]
) -> None:
    if defects and on_corrupt == "stop":
        raise ValueError(
            f"load has a damaged checkpoint: {'; '.join(defects)}. Iteration {iteration} is "
            "intact: set --lora-on-corrupt previous to go on from it"
        )
    for defect in defects:
        warn(f"WARNING: damaged checkpoint: {defect}")
    if defects:
        warn(f"WARNING: going on from iteration {iteration}, the newest that is intact")


def _write_tracker(root: Path, iteration: int) -> None:
    beside = root / f".{TRACKER}.{socket.gethostname()}.{os.getpid()}"
    try:
        beside.write_text(str(iteration))
        beside.replace(root / TRACKER)
    except OSError as error:
        raise ValueError(
            f"load {root} must go back to iteration {iteration} and its {TRACKER} cannot be "
            f"written ({error.strerror}): write {iteration} into it"
        ) from error
