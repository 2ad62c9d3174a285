"""A process for each rank that is planned: forked from one that has imported Megatron."""

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megalora.plan import world
from megalora.plan.refusal import refusal
from megalora.progress import Progress

if TYPE_CHECKING:
    from megalora.plan.child import Answer

# Of a plan without a script.
OWN_SCRIPT = Path(__file__).with_name("pretrain.py")
# Lines of a rank's output that are shown where it failed without a sentence of its own.
_SHOWN = 15
# Frames of a traceback: the innermost.
_FRAMES = -3
_TRACEBACK = "MEGALORA_TRACEBACK"


@dataclass(frozen=True, slots=True)
class Job:
    """What is planned: a launch script with its flags, on so many GPUs."""

    script: Path
    argv: tuple[str, ...]
    world_size: int
    gpus_per_node: int

    def with_flags(self, flags: Sequence[str]) -> "Job":
        """Return the job with more flags, which override those before them."""
        return replace(self, argv=(*self.argv, *flags))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank has no plan, in a sentence; output: what its process said, where that helps.

    is_clear: the sentence says what is wrong with the input. is_end: the script ended well without
    a model, as for --help.
    """

    sentence: str
    output: str = ""
    is_clear: bool = False
    is_end: bool = False


class FailedError(ValueError):
    """A rank cannot be planned."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


def plan_each(wanted: Sequence[tuple[Job, int]]) -> list["Answer | Failure"]:
    """Plan ranks of several jobs, as many at once as there are cores; in the order given."""
    with Progress("planning", len(wanted), "ranks") as progress:
        return _plan_each(wanted, progress)


def _plan_each(wanted: Sequence[tuple[Job, int]], progress: Progress) -> list["Answer | Failure"]:
    _import_megatron()
    answers: dict[int, Answer | Failure] = {}
    waiting, running = deque(enumerate(wanted)), dict[Connection, tuple[int, _Child]]()
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                place, (job, rank) = waiting.popleft()
                child = _Child(job, rank)
                running[child.receiver] = (place, child)
            for ready in connection.wait(list(running)):
                place, child = running.pop(ready)  # type: ignore[arg-type]
                answers[place] = child.answer()
                progress.add()
    finally:
        for _, child in running.values():
            child.stop()
    return [answers[place] for place in range(len(wanted))]


@functools.cache
def _import_megatron() -> None:
    """Import once what each rank's process needs; they are forked from this one."""
    world.install()
    # Megatron must not be imported before.
    importlib.import_module("megalora.plan.child")


class _Child:
    """The process of one rank, whose output is kept in a file without a name."""

    def __init__(self, job: Job, rank: int) -> None:
        context = multiprocessing.get_context("fork")
        self.rank = rank
        self.receiver, sender = context.Pipe(duplex=False)
        # In memory: a plan writes no files.
        self.output = os.fdopen(os.memfd_create(f"rank{rank}"), "w+b")
        self.process = context.Process(target=_run, args=(job, rank, sender, self.output))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.process.start()
        sender.close()

    def answer(self) -> "Answer | Failure":
        """Return what the process handed back, once it has; or why it has not."""
        try:
            found: Answer | Failure = self.receiver.recv()
        except EOFError:
            self.process.join()
            found = Failure(f"rank {self.rank} could not be planned: {self._end()}", self._tail())
        self.process.join()
        if isinstance(found, Failure) and (not found.is_clear or _TRACEBACK in os.environ):
            found = replace(found, output=self._tail(None if found.is_end else _SHOWN))
        self.output.close()
        return found

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.output.close()

    def _end(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"its process ended with status {code} and without a word"
        name = signal.Signals(-code).name
        memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"

    def _tail(self, lines: int | None = _SHOWN) -> str:
        self.output.seek(0)
        said = self.output.read().decode(errors="replace").splitlines()
        return "\n".join(said if lines is None else said[-lines:])


def _run(job: Job, rank: int, sender: Connection, output: IO[bytes]) -> None:
    """Plan a rank in this process, which ends here."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    try:
        found: Answer | Failure = _answer(job, rank)
    except BaseException as error:
        found = _failure(error, rank)
    with contextlib.suppress(OSError):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    sender.send(found)
    # Whatever the script has left to do at its end, no training has come before it.
    os._exit(0)


def _answer(job: Job, rank: int) -> "Answer":
    child: Any = importlib.import_module("megalora.plan.child")
    sys.path.insert(0, str(job.script.parent))
    return child.answer(
        rank, job.script, job.argv, world_size=job.world_size, gpus_per_node=job.gpus_per_node
    )


def _failure(error: BaseException, rank: int) -> Failure:
    if isinstance(error, SystemExit) and not error.code:
        return Failure("the script ended before it built a model", is_end=True)
    traceback.print_exception(error, limit=None if _TRACEBACK in os.environ else _FRAMES)
    sentence, is_clear = refusal(error)
    if is_clear:
        return Failure(sentence, is_clear=True)
    return Failure(f"rank {rank} could not be planned: {sentence}")
