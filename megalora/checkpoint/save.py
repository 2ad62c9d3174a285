"""Saving without losing the checkpoint before: checksums, stale directories, clear reports."""

import contextlib
import functools
import inspect
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import async_utils, get_args
from torch.distributed.checkpoint.api import CheckpointException

from megalora.checkpoint import optimizer_state, schedule, writers
from megalora.checkpoint.layout import iteration_directory, read_iteration
from megalora.replace import replace_once

_POLL_S = 0.05
# An interval in iterations that no run reaches: Megatron saves at the end of it all the same.
_NEVER = 1 << 31


def install() -> None:
    """Wrap what Megatron's training loop calls to save; a second call does nothing.

    Raises RuntimeError where this Megatron saves in a way that megalora does not know.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import training

    save, finish = training.save_checkpoint, training.maybe_finalize_async_save
    if getattr(save, "is_megalora", False):
        return
    known = {"iteration", "non_persistent_ckpt"} <= set(inspect.signature(save).parameters)
    known &= {"blocking", "terminate"} <= set(inspect.signature(finish).parameters)
    if not known or "verify_integrity" not in inspect.signature(dist_checkpointing.save).parameters:
        raise RuntimeError(
            "megatron.training saves checkpoints in a way that megalora does not know: use "
            "megatron-core 0.19 or 0.20"
        )
    writers.install()
    optimizer_state.install()
    schedule.install()
    saver = Saver(save, finish)
    wrapped: Any = functools.wraps(save)(functools.partial(saver.save))
    wrapped.is_megalora = True
    training.save_checkpoint = wrapped
    training.maybe_finalize_async_save = saver.finish


def save_last_by_default() -> None:
    """Let --save without --save-interval save after the last iteration; a second call does nothing.

    Megatron has no default and would raise a bare AssertionError. Its ends by a signal or by
    --exit-duration-in-mins save too.
    """
    from megatron.training import arguments

    def validate(original: Callable[..., Any], args: Any, *more: Any, **kwargs: Any) -> Any:
        if args.save and args.lora_rank and args.save_interval is None:
            args.save_interval = args.train_iters or _NEVER
        return original(args, *more, **kwargs)

    replace_once(arguments, "validate_args", validate)


class Saver:
    """Megatron's saving with a manifest of checksums, and reports of what failed.

    save, finish: Megatron's `save_checkpoint` and `maybe_finalize_async_save`. All ranks must call
    each method together.
    """

    def __init__(self, save: Callable[..., None], finish: Callable[..., None]) -> None:
        self._save, self._finish = save, finish
        # Iterations that are being written asynchronously, oldest first.
        self.pending: list[int] = []

    def save(
        self,
        iteration: int,
        model: list[torch.nn.Module],
        optimizer: optimizer_state.Part | None,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Save, or start to, with a manifest, into a directory without stale files.

        A failure is reported with what is left to go on from, and raised.
        """
        run: Any = get_args()
        if iteration in self.pending:
            # Else its files would be removed, or mixed, under the process that writes them.
            self.finish(blocking=True)
        if dist.get_rank() == 0 and not kwargs.get("non_persistent_ckpt"):
            _remove_stale(Path(run.save), iteration)
        if optimizer is not None:
            optimizer_state.complete(optimizer)
        verify, run.verify_integrity = run.verify_integrity, True
        try:
            with _reported(iteration, run.save):
                _check_writer()
                self._save(iteration, model, optimizer, *args, **kwargs)
        finally:
            run.verify_integrity = verify
        if run.async_save:
            self.pending.append(iteration)

    def finish(self, blocking: bool = False, terminate: bool = False) -> None:
        """Finish asynchronous saves that are written: metadata, manifest, tracker file.

        blocking: wait for all. terminate: end the writing process too. A failure is reported and
        raised, and so is a writing process that died, for which Megatron waits for ever.
        """
        if not self.pending:
            self._finish(blocking=blocking, terminate=terminate)
            return
        run: Any = get_args()
        with _reported(self.pending[0], run.save):
            _check_writer()
            self._finish(blocking=False)
            while blocking and _num_unfinished():
                time.sleep(_POLL_S)
                _check_writer()
                self._finish(blocking=False)
        del self.pending[: len(self.pending) - _num_unfinished()]
        if terminate:
            self._finish(blocking=True, terminate=True)


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
    try:
        yield
    # torch's CheckpointException, of what a writing process ran into, is no Exception.
    except (Exception, CheckpointException) as error:
        previous = read_iteration(Path(directory))
        left = "no earlier checkpoint" if previous is None else f"iteration {previous}, intact"
        print(
            f"error: checkpoint of iteration {iteration} was not saved in {directory}: "
            f"{_cause(error)}. What is left there is {left}: make room and start again",
            flush=True,
        )
        raise


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
