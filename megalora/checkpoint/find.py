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

import torch.distributed as dist

from megalora.checkpoint.read import read_description
from megalora.replace import replace_once

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
    result: list[Any] = [None, None]
    if dist.get_rank() == 0 and load:
        try:
            result[0] = find_checkpoint(load, step=step, on_corrupt=on_corrupt, warn=warn)
        except ValueError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    found, error = result
    if error is not None:
        raise ValueError(error)
    return found


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


def guard_checkpoint_args() -> None:
    """Let --use-checkpoint-args read its flags from the checkpoint that the run will go on from.

    Megatron reads them before any process group exists, so each rank checks the files by itself and
    finds the same; the tracker file then names it. A second call does nothing.
    """
    from megatron.training import checkpointing

    def load_args(
        original: Callable[..., Any], args: Any, load_arg: str = "load", *more: Any, **kwargs: Any
    ) -> Any:
        if load_arg == "load" and args.load and args.lora_rank:
            find_checkpoint(
                args.load, step=args.ckpt_step, on_corrupt=args.lora_on_corrupt, warn=_say_once
            )
        return original(args, load_arg, *more, **kwargs)

    replace_once(checkpointing, "load_args_from_checkpoint", load_args)


def end_where_done() -> None:
    """Let a run that starts again after its last iteration end well, and write its exports.

    A scheduler does so where its signal to stop meets the end of the run; Megatron's samplers would
    raise AssertionError, as no sample is left. A second call does nothing.
    """
    from megatron.training import get_args, print_rank_0, training

    def build(original: Callable[..., Any], provider: Any) -> Any:
        args: Any = get_args()
        if not args.train_iters or args.iteration < args.train_iters:
            return original(provider)
        print_rank_0(f"> LoRA: iteration {args.iteration} was the last: nothing is left to train")
        args.do_train = args.do_valid = args.do_test = False
        return None, None, None

    replace_once(training, "build_train_valid_test_data_iterators", build)


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


def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


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
