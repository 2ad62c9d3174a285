"""Saving without losing the checkpoint before: checksums, stale directories, clear reports."""

import functools
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megalora.resume import iteration_directory, read_iteration


def install() -> None:
    """Wrap the `save_checkpoint` that Megatron's training loop calls; a second call does nothing.

    Raises RuntimeError where this Megatron saves in a way that megalora does not know.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import training

    original = training.save_checkpoint
    if getattr(original, "is_megalora", False):
        return
    known = {"iteration", "non_persistent_ckpt"} <= set(inspect.signature(original).parameters)
    if not known or "verify_integrity" not in inspect.signature(dist_checkpointing.save).parameters:
        raise RuntimeError(
            "megatron.training saves checkpoints in a way that megalora does not know: use "
            "megatron-core 0.19 or 0.20"
        )
    wrapped: Any = functools.wraps(original)(functools.partial(save, original))
    wrapped.is_megalora = True
    training.save_checkpoint = wrapped


def save(original: Callable[..., None], iteration: int, *args: Any, **kwargs: Any) -> None:
    """Save by Megatron, with a manifest of checksums, into a directory without stale files.

    A failure is reported with what is left to go on from, and raised.
    """
    from megatron.training import get_args

    run: Any = get_args()
    if dist.get_rank() == 0 and not kwargs.get("non_persistent_ckpt"):
        _remove_stale(Path(run.save), iteration)
    verify, run.verify_integrity = run.verify_integrity, True
    try:
        original(iteration, *args, **kwargs)
    # torch's CheckpointException, of what a writing process ran into, is no Exception.
    except (Exception, CheckpointException) as error:
        previous = read_iteration(Path(run.save))
        left = "no earlier checkpoint" if previous is None else f"iteration {previous}, intact"
        print(
            f"error: checkpoint of iteration {iteration} was not saved in {run.save}: "
            f"{_cause(error)}. What is left there is {left}: make room and start again",
            flush=True,
        )
        raise
    finally:
        run.verify_integrity = verify


def _remove_stale(root: Path, iteration: int) -> None:
    """Remove what a save that was killed left of this iteration: Megatron would mix it in.

    Files of another world size would stay, and be taken for a part of the new checkpoint.
    """
    directory = iteration_directory(root, iteration)
    if directory.is_dir() and read_iteration(root) != iteration:
        shutil.rmtree(directory)


def _cause(error: BaseException) -> str:
    """Return the innermost reason: Megatron and torch wrap the OSError of a writing process."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
