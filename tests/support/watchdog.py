"""Tell a run that is slow from one that stands still: a busy machine only makes it slow."""

import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

STALL_S = 300.0
POLL_S = 0.05
TAIL_LINES = 80


class Watchdog:
    """Watch the files that a run writes: as long as one of them grows, it makes progress."""

    def __init__(self, directory: Path, stall_s: float = STALL_S) -> None:
        self.directory, self.stall_s = directory, stall_s
        self.size, self.idle, self.last = 0, 0.0, time.monotonic()

    def stalled(self) -> bool:
        """Say whether nothing has been written for `stall_s` seconds of watching.

        Between two calls a second counts at most: after a pause of the whole machine, the run may
        go on.
        """
        now, size = time.monotonic(), self._written()
        self.idle = self.idle + min(now - self.last, 1.0) if size == self.size else 0.0
        self.size, self.last = size, now
        return self.idle > self.stall_s

    def _written(self) -> int:
        size = 0
        for path in self.directory.rglob("*"):
            # A temporary file may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
        return size


def run_watched(
    command: Sequence[str], logs: Path, *, stall_s: float = STALL_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command whose output goes to files in `logs`; fail the test where it stands still.

    Whatever the command writes into `logs` besides counts as progress. `options` are Popen's.
    """
    out, err = logs / "out.log", logs / "err.log"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, **options)
    try:
        watchdog = Watchdog(logs, stall_s)
        while process.poll() is None:
            if watchdog.stalled():
                pytest.fail(f"nothing written for {stall_s} s\n{tail_of_logs(logs)}", pytrace=False)
            time.sleep(POLL_S)
    finally:
        kill_tree(process.pid)
    texts = [path.read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess(command, process.wait(), *texts)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started, if it still runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        children = process.children(recursive=True)
        for member in (process, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(children)


def tail_of_logs(directory: Path) -> str:
    """Return the last lines of the logs that tell of a failure, or of all if none does."""
    logs = {path: path.read_text(errors="replace") for path in directory.rglob("*.log")}
    telling = {path: text for path, text in logs.items() if "FAILED" in text or "ERROR" in text}
    return "\n".join(
        f"== {path.relative_to(directory)}\n" + "\n".join(text.splitlines()[-TAIL_LINES:])
        for path, text in sorted((telling or logs).items())
        if text.strip()
    )
