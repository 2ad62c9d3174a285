"""The processes beside a rank that write its checkpoints: they live as long as it does.

A rank writes with the help of two processes: one carries the results of a write, in every save; the
other writes, with --async-save and --use-persistent-ckpt-worker. torchrun and Slurm send SIGTERM to
a rank and to everything it started. The rank answers by a last save (--exit-signal-handler), for
which it needs both; and a rank that is killed leaves them behind, holding memory of the GPU.
"""

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

# NOTE: writers that are spawned import this before Megatron: only functions import it.

_WATCH_S = 1.0


def install() -> None:
    """Let the writers of this process outlive SIGTERM, and end with it; once is enough.

    Must run before Megatron starts them, in `initialize_megatron` or in the first save. Only
    Megatron's own are known; nvidia_resiliency_ext has its own. Raises RuntimeError where this
    Megatron starts them in a way that megalora does not know.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    if hasattr(PersistentAsyncCaller, "megatron_loop"):
        return
    known = hasattr(filesystem_async, "_results_queue")
    if not known or not {"_get_process", "async_loop"} <= vars(PersistentAsyncCaller).keys():
        raise RuntimeError(
            "megatron.core starts the processes that write checkpoints in a way that megalora does "
            "not know: use megatron-core 0.19 or 0.20"
        )
    patched: Any = filesystem_async
    patched.get_write_results_queue = _results_queue
    patched = PersistentAsyncCaller
    start = patched._get_process.__func__
    patched.megatron_loop = staticmethod(patched.async_loop)
    patched.async_loop = staticmethod(functools.partial(write_for, os.getpid()))
    patched._get_process = classmethod(functools.partial(_start_writer, start))


def write_for(trainer: int, *args: object) -> None:
    """Be the process that writes asynchronously. trainer: process id of the rank."""
    outlive_sigterm(trainer)
    # A forked writer has what `install` changed, a spawned one has Megatron as it is.
    caller: Any = _persistent_caller()
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
    caller = _persistent_caller()
    for queue in (caller._persistent_queue, caller._persistent_preload_q):
        if queue is not None:
            queue.cancel_join_thread()


def _persistent_caller() -> "type[PersistentAsyncCaller]":
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    return PersistentAsyncCaller


def _writers() -> Iterator[BaseProcess]:
    from megatron.training import async_utils

    calls = getattr(async_utils._async_calls_queue, "async_calls", ())
    callers = [_persistent_caller()._persistent_process]
    callers += [getattr(call.async_caller, "process", None) for call in calls]
    yield from (process for process in callers if process is not None)


def _results_queue(mp_mode: str = "spawn") -> Any:
    """Do what get_write_results_queue does, with a process that outlives SIGTERM."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    if module._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        manager.start(outlive_sigterm, (os.getpid(),))
        module._results_queue = manager.Queue()
    return module._results_queue


def _start_writer(
    start: Callable[..., BaseProcess],
    caller: "type[PersistentAsyncCaller]",
    *args: object,
    **kwargs: object,
) -> BaseProcess:
    is_new = caller._persistent_process is None
    process = start(caller, *args, **kwargs)
    if is_new:
        # Before multiprocessing sends its own SIGTERM at exit and waits, for ever.
        Finalize(process, process.kill, exitpriority=1)
    return process


def _end_after(trainer: int) -> None:
    while True:
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(_WATCH_S)
