"""Start the ranks of a run in a second: fork them from a server that has imported Megatron.

Importing torch and Megatron takes each process some ten seconds, and tests of restarts need many.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import resource
import runpy
import secrets
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.watchdog import POLL_S, STALL_S, Watchdog, tail_of_logs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "pretrain_tiny.py"
# A rank that has written nothing for so long after another failed waits for that other.
REPORT_S = 3.0
# Far below the ten minutes that a collective waits.
END_S = 60.0


# A process has one such server, and whoever starts it first, as compileall does, has to find this.
multiprocessing.set_forkserver_preload(["tests.support.megatron_cpu"])
# Read by OpenMP when the server imports torch.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


class Ranks:
    """The processes of one run, each with its own log file.

    by_megalora: run `megalora run SCRIPT`; else the script itself, which brings LoRA of its own.
    own_flags, own_env: what one rank is given besides.
    """

    def __init__(
        self,
        world_size: int,
        flags: Sequence[object],
        logs: Path,
        *,
        script: Path = SCRIPT,
        by_megalora: bool = True,
        env: Mapping[str, str] | None = None,
        own_flags: Mapping[int, Sequence[object]] | None = None,
        own_env: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in range(world_size)]
        common = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free_port()),
            "MEGALORA_TRACEBACK": "1",
            **(env or {}),
        }
        self.watchdog = Watchdog(logs)
        context = _server()
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own |= (own_env or {}).get(rank, {})
            given = [script, *flags, *(own_flags or {}).get(rank, ())]
            words = [str(word) for word in given]
            process = context.Process(target=_run_rank, args=(words, by_megalora, own, str(log)))
            process.start()
            self.processes.append(process)

    def is_alive(self) -> bool:
        """Say whether every rank runs."""
        return all(process.exitcode is None for process in self.processes)

    def kill(self, rank: int) -> None:
        """End one rank as a lost machine would."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask all ranks to stop, and all they started, as torchrun and Slurm do."""
        for process in self.processes:
            os.killpg(process.pid, signal.SIGTERM)

    def ask(self) -> None:
        """Ask every rank to stop by a signal of its own choice, SIGUSR1."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGUSR1)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fail where a rank ends before, or where no rank writes any more."""
        while not condition():
            if not self.is_alive():
                # What a rank writes last may be what the condition waits for.
                assert condition(), f"a rank ended\n{self.text()}"
            self._fail_where_stalled()
            time.sleep(POLL_S)

    def wait(self) -> list[int]:
        """Return the exit codes; once one rank has failed, kill the others, as torchrun does."""
        while any(process.exitcode is None for process in self.processes):
            if any(process.exitcode for process in self.processes):
                self._let_report()
                break
            self._fail_where_stalled()
            time.sleep(POLL_S)
        self._kill_all()
        return [process.exitcode or 0 for process in self.processes]

    def end(self) -> list[int]:
        """Return the exit codes once every rank has ended by itself, which takes seconds."""
        watchdog = Watchdog(self.watchdog.directory, END_S)
        while any(process.exitcode is None for process in self.processes):
            if watchdog.stalled():
                self._kill_all()
                pytest.fail(f"a rank does not end\n{self.text()}", pytrace=False)
            time.sleep(POLL_S)
        return [process.exitcode or 0 for process in self.processes]

    def _let_report(self) -> None:
        """Wait for the ranks that are about to report the error of another."""
        watchdog = Watchdog(self.watchdog.directory, REPORT_S)
        while any(process.exitcode is None for process in self.processes):
            if watchdog.stalled():
                break
            time.sleep(POLL_S)

    def _fail_where_stalled(self) -> None:
        if self.watchdog.stalled():
            self._kill_all()
            logs = tail_of_logs(self.watchdog.directory)
            pytest.fail(f"nothing written for {STALL_S} s\n{logs}", pytrace=False)

    def _kill_all(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def succeed(self) -> "Ranks":
        """Wait, and fail with the logs unless every rank ends well."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.text()}"
        return self

    def fail(self) -> str:
        """Wait for a failure and return the logs."""
        codes = self.wait()
        assert any(codes), f"no rank failed\n{self.text()}"
        return self.text()

    def text(self) -> str:
        """Return what all ranks wrote."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def losses(self) -> dict[int, float]:
        """Return the loss of every iteration that the last rank logged."""
        found = {}
        if not self.logs[-1].exists():
            return found
        text = self.logs[-1].read_text(errors="replace")
        # The last line may be half written.
        for line in text[: text.rfind("\n") + 1].splitlines():
            if "lm loss:" in line:
                iteration = int(line.split("iteration")[1].split("/")[0])
                found[iteration] = float(line.split("lm loss:")[1].split("|")[0])
        return found


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a forked process, which has Megatron imported."""
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return pickle.loads(receiver.recv_bytes())
    finally:
        process.join()


def _call(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # NOTE: by value: of a tensor, multiprocessing sends what the process must live to hand over.
    sender.send_bytes(pickle.dumps(function(*args)))


def _server() -> Any:
    return multiprocessing.get_context("forkserver")


def _run_rank(words: list[str], by_megalora: bool, env: dict[str, str], log: str) -> None:
    os.environ.update(env)
    # What Megatron's writers spawn is in this group, and outlives a killed rank.
    os.setpgrp()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit := int(env.get("FILE_LIMIT", 0)):
        # Writing beyond it is an OSError, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "SPAWN" not in env:
        _fork_results()
    from megalora.__main__ import main

    # As in a process of its own; a forked one has the server's start method and main module.
    multiprocessing.set_start_method("fork", force=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        if by_megalora:
            sys.exit(main(["run", *words]))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    finally:
        # A forked process leaves them out.
        atexit._run_exitfuncs()


def with_root(environ: Mapping[str, str] = os.environ) -> str:
    """Return a PYTHONPATH that finds this checkout before all that it found already."""
    return os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))


def _fork_results() -> None:
    """Fork the process that holds what writers answer; a spawned one imports torch once more."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megalora.checkpoint import writers

    megatron: Any = filesystem_async
    megatron.get_write_results_queue = functools.partial(
        megatron.get_write_results_queue, mp_mode="fork"
    )
    writers.results_queue.__defaults__ = ("fork",)


def free_port() -> int:
    """Return a port that nothing listens on, and that nobody gets who asks for any port."""
    while True:
        # The system hands out those from 32768 on: another run's gloo would take it meanwhile.
        port = secrets.choice(range(15000, 32000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
