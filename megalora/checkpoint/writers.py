"""The processes beside a rank that write its checkpoints: they live as long as it does.

A rank writes with the help of two processes: one carries the results of a write, in every save; the
other writes, with --async-save and --use-persistent-ckpt-worker. torchrun and Slurm send SIGTERM to
a rank and to everything it started. The rank answers by a last save (--exit-signal-handler), for
which it needs both; and a rank that is killed leaves them behind, holding memory of the GPU.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from queue import Queue
from typing import TYPE_CHECKING, Any

# NOTE: writers that are spawned import this before Megatron: only functions import it.
if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

_WATCH_S = 1.0
# Of Megatron's writers: they say there why a write failed, and raise only that it did.
_LOGGER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def outliving(loop: Callable[..., None]) -> Callable[..., None]:
    """Let the loop of an asynchronous writer outlive SIGTERM, and end with this rank.

    What stands in its place is pickled, and must need nothing of what this process has changed.
    """
    patched: Any = _caller()
    patched.megatron_loop = staticmethod(loop)
    return functools.partial(write_for, os.getpid())


def write_for(trainer: int, *args: object) -> None:
    """Be the process that writes asynchronously. trainer: process id of the rank."""
    outlive_sigterm(trainer)
    # A forked writer has what `outliving` changed, a spawned one has Megatron as it is.
    caller: Any = _caller()
    getattr(caller, "megatron_loop", caller.async_loop)(*args)


def outlive_sigterm(trainer: int) -> None:
    """Ignore SIGTERM in this process, and end it once its trainer is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(trainer,), daemon=True).start()


def dead_writer() -> BaseProcess | None:
    """Return the process of this rank that should write checkpoints and has ended."""
    return next((process for process in _writers() if process.exitcode), None)


def forget_writer() -> None:
    """Let this process exit although nobody reads what it sent to a dead writer."""
    for queue in (_caller()._persistent_queue, _caller()._persistent_preload_q):
        if queue is not None:
            queue.cancel_join_thread()


@contextlib.contextmanager
def said_of_failures() -> Iterator[list[str]]:
    """Collect what is logged in this process of writes that fail."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(_LOGGER)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _writers() -> Iterator[BaseProcess]:
    from megatron.training import async_utils

    calls = getattr(async_utils._async_calls_queue, "async_calls", ())
    callers = [_caller()._persistent_process]
    callers += [getattr(call.async_caller, "process", None) for call in calls]
    yield from (process for process in callers if process is not None)


def results_queue(mp_mode: str = "spawn") -> Queue[object]:
    """Do what get_write_results_queue does, with a process that outlives SIGTERM."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    if module._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(outlive_sigterm, (os.getpid(),))
        module._results_queue = manager.Queue()
    return module._results_queue


def start_writer(
    start: Callable[..., BaseProcess],
    caller: "type[PersistentAsyncCaller]",
    *args: object,
    **kwargs: object,
) -> BaseProcess:
    """Start the writer of a rank where it has none, which is killed when the rank exits."""
    is_new = caller._persistent_process is None
    process = start(caller, *args, **kwargs)
    if is_new:
        # Before multiprocessing sends its own SIGTERM at exit and waits, for ever.
        Finalize(process, process.kill, exitpriority=1)
    return process


def _caller() -> "type[PersistentAsyncCaller]":
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    return PersistentAsyncCaller


def _end_after(trainer: int) -> None:
    while True:
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(_WATCH_S)
