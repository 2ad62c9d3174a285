"""Saving without losing the checkpoint before: checksums, stale directories, clear reports."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.training import async_utils, get_args, training
from torch.distributed.checkpoint.api import CheckpointException

from megalora.checkpoint import lock, optimizer_state, writers
from megalora.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    METADATA,
    iteration_directory,
    read_iteration,
)
from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.state import refuse_not_finite

_POLL_S = 0.05
# Ends of what is saved: tensors and other objects, where each is, the format, the checksums.
_PARTS = (".distcp", ".pt", METADATA, FORMAT, MANIFEST)


class Saver:
    """Megatron's saving with a manifest of checksums, and reports of what failed.

    All ranks must call each method together.
    """

    def __init__(self) -> None:
        # Iterations that are being written asynchronously, oldest first.
        self.pending: list[int] = []

    def save(
        self,
        original: Callable[..., None],
        iteration: int,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Save, or start to, with a manifest, into a directory without stale files.

        A failure is reported with what is left to go on from, and raised. Raises ValueError on all
        ranks, with nothing changed, where another run has taken the directory or an adapter is not
        finite.
        """
        run: Any = get_args()
        on_all_ranks(lambda: lock.check(run.save), only=0)
        refuse_not_finite(
            model,
            f"checkpoint of iteration {iteration} is not saved: training diverged, NaN or infinite "
            "values are in {}. Go on from the checkpoint before, with a lower --lr".format,
        )
        if iteration in self.pending:
            # Else its files would be removed, or mixed, under the process that writes them.
            training.maybe_finalize_async_save(blocking=True)
        if dist.get_rank() == 0 and not kwargs.get("non_persistent_ckpt"):
            _remove_stale(Path(run.save), iteration)
        if optimizer is not None:
            optimizer_state.complete(optimizer)
        verify, run.verify_integrity = run.verify_integrity, True
        try:
            with _reported(iteration, run.save):
                _check_writer()
                original(iteration, model, optimizer, *args, **kwargs)
        finally:
            run.verify_integrity = verify
        if run.async_save:
            self.pending.append(iteration)

    def finish(
        self, original: Callable[..., None], blocking: bool = False, terminate: bool = False
    ) -> None:
        """Finish asynchronous saves that are written: metadata, manifest, tracker file.

        blocking: wait for all. terminate: end the writing process too. A failure is reported and
        raised, and so is a writing process that died, for which Megatron waits for ever.
        """
        if not self.pending:
            original(blocking=blocking, terminate=terminate)
            return
        run: Any = get_args()
        with _reported(self.pending[0], run.save):
            _check_writer()
            original(blocking=False)
            while blocking and _num_unfinished():
                time.sleep(_POLL_S)
                _check_writer()
                original(blocking=False)
        del self.pending[: len(self.pending) - _num_unfinished()]
        if terminate:
            original(blocking=True, terminate=True)


def _num_unfinished() -> int:
    """Return how many asynchronous saves are not finished, the same on every rank."""
    queue = async_utils._async_calls_queue
    return 0 if queue is None else queue.get_num_unfinalized_calls()


def _check_writer() -> None:
    process = writers.dead_writer()
    if process is not None:
        writers.forget_writer()
        raise RuntimeError(f"the process that writes checkpoints ended ({process.exitcode})")


@contextlib.contextmanager
def _reported(iteration: int, directory: str) -> Iterator[None]:
    """Say, where a save fails, what is left to go on from."""
    with writers.said_of_failures() as said:
        try:
            yield
        # torch's CheckpointException, of what a writing process ran into, is no Exception.
        except (Exception, CheckpointException) as error:
            previous = read_iteration(Path(directory))
            left = "no earlier checkpoint" if previous is None else f"iteration {previous}, intact"
            print(
                f"error: checkpoint of iteration {iteration} was not saved in {directory}: "
                f"{said[0] if said else _cause(error)}. What is left there is {left}: make room "
                "and start again",
                flush=True,
            )
            raise


def _remove_stale(root: Path, iteration: int) -> None:
    """Remove what a save that was killed left of this iteration: Megatron would mix it in.

    Files of another world size would stay, and be taken for a part of the new checkpoint. What else
    is in the directory is somebody's, and stays.
    """
    directory = iteration_directory(root, iteration)
    if directory.is_dir() and read_iteration(root) != iteration:
        for path in directory.iterdir():
            if path.name.endswith(_PARTS):
                path.unlink()


def _cause(error: BaseException) -> str:
    """Return the innermost reason: Megatron and torch wrap the OSError of a writing process."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
