"""Which checkpoint a run goes on from: the newest intact one, whatever happened while it was saved.

A save that was killed leaves the tracker file on the checkpoint before, or an empty tracker file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalora.checkpoint.layout import (
    MANIFEST,
    RELEASE,
    TENSORS,
    TRACKER,
    Iteration,
    Sums,
    check_sums,
    choice_of,
    find_damage,
    has_manifest,
    iteration_directory,
    list_iterations,
    read_tracker,
    write_tracker,
)
from megalora.checkpoint.read import read_description
from megalora.checkpoint.sums import with_all_ranks
from megalora.printable import printable

OnCorrupt = Literal["previous", "stop"]


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint to load.

    iteration: the last one trained, 0 for a release. description: what megalora stored with the
    adapters; None for a checkpoint of a whole model.
    """

    directory: str
    iteration: int
    description: dict[str, Any] | None


def find_on_all_ranks(
    load: str | None, *, step: int | None, on_corrupt: OnCorrupt, warn: Callable[[str], None]
) -> Found | None:
    """Find the checkpoint on rank 0, and tell all ranks, which help it to check the files."""

    def find(sums: Sums) -> Found | None:
        given = {"step": step, "on_corrupt": on_corrupt, "warn": warn}
        return find_checkpoint(load, **given, sums=sums) if load else None

    return with_all_ranks(find)


def find_checkpoint(
    load: str | Path,
    *,
    step: int | None,
    on_corrupt: OnCorrupt,
    warn: Callable[[str], None],
    sums: Sums = check_sums,
) -> Found | None:
    """Return the newest intact checkpoint in a directory, None where it has none yet.

    step: load exactly this iteration. on_corrupt: `previous` takes the checkpoint before a damaged
    one, after a warning that names the damage, and sets the tracker file back to it; `stop` raises
    ValueError. Also raises it where no checkpoint is intact. sums: checks files.
    """
    root, tracker = Path(load), read_tracker(Path(load))

    def say(text: str) -> None:
        warn(f"WARNING: {printable(text)}")

    named, candidates = _candidates(root, tracker.newest, step)
    defects = [tracker.defect] if tracker.defect else []
    for iteration in candidates:
        directory = iteration_directory(root, iteration)
        found, defect = _check(directory, iteration, sums, is_named=iteration == named)
        if found is None:
            defects += [f"{directory}: {defect}"] if defect else []
            continue
        if defect is not None:
            say(f"checkpoint {directory} is not verified: {defect}")
        _report(defects, iteration, on_corrupt, say)
        if iteration != named or tracker.defect:
            _go_back(root, iteration)
        return found
    if candidates:
        _refuse(root, defects)
    for defect in defects:
        say(f"{defect}, and no checkpoint is beside it: starting anew")
    return None


def _refuse(root: Path, defects: list[str]) -> None:
    if defects:
        raise ValueError(
            f"load {root} has no intact checkpoint to go on from: {'; '.join(defects)}: copy it "
            "again from where it is intact, or give another directory"
        )


def check_flags(directory: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Check those of a checkpoint's files that say how it was made, which rank 0 has written."""
    read = {name for name in digests if not name.endswith(TENSORS) or name.startswith("__0_")}
    return check_sums(directory, {name: digests[name] for name in read})


def _candidates(
    root: Path, newest: Iteration | None, step: int | None
) -> tuple[Iteration | None, Sequence[Iteration]]:
    """Return the checkpoint that is named, and all to try, newest first; none is newer than it."""
    # As for Megatron, which finds no iteration beside a release.
    named = RELEASE if newest == RELEASE else step or newest
    there = list_iterations(root)
    if named is None:
        return None, there
    older: list[Iteration] = [each for each in there if _number(each) < _number(named)]
    return named, (named,) if step or named == RELEASE else (named, *older)


def _number(iteration: Iteration) -> int:
    return 0 if iteration == RELEASE else iteration


def _check(
    directory: Path, iteration: Iteration, sums: Sums, *, is_named: bool
) -> tuple[Found | None, str | None]:
    """Return the checkpoint where it is intact, and what is wrong or unknown about it.

    Neither is returned for what a killed save left, which is nothing to warn of. is_named: the
    tracker file or the user names it, so Megatron finished it, and a missing manifest only means
    that something other than megalora saved it.
    """
    if not directory.is_dir():
        there = list_iterations(directory.parent)
        return None, f"it is missing, but {TRACKER} or --ckpt-step names it: {choice_of(there)}"
    is_verified = has_manifest(directory)
    if not is_verified and not is_named:
        return None, None
    if damage := find_damage(directory, sums):
        return None, ", ".join(damage)
    try:
        description = read_description(directory)
    except ValueError as error:
        return None, str(error)
    if description is not None and iteration == RELEASE:
        # Megatron takes its weights alone.
        description = {**description, "distributed_optimizer": None, "schedule": None}
    found = Found(str(directory), _number(iteration), description)
    return found, f"it has no {MANIFEST}" if description and not is_verified else None


def _report(
    defects: list[str], iteration: Iteration, on_corrupt: OnCorrupt, say: Callable[[str], None]
) -> None:
    if defects and on_corrupt == "stop":
        raise ValueError(
            f"load has a damaged checkpoint: {'; '.join(defects)}. Iteration {iteration} is "
            "intact: set --lora-on-corrupt previous to go on from it"
        )
    for defect in defects:
        say(f"damaged checkpoint: {defect}")
    if defects:
        say(f"going on from iteration {iteration} instead")


def _go_back(root: Path, iteration: Iteration) -> None:
    try:
        write_tracker(root, iteration)
    except OSError as error:
        raise ValueError(
            f"load {root} must go back to iteration {iteration} and its {TRACKER} cannot be "
            f"written ({error.strerror}): write {iteration} into it"
        ) from error
