"""How far long work is: one line that changes on a terminal, a few lines in a log.

It goes to stderr, on rank 0 alone, and only once the work has taken some seconds;
MEGALORA_PROGRESS=0 in the environment silences it.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

QUIET = "MEGALORA_PROGRESS"
# Seconds of work before the first word, and between two: on a terminal, and in a log.
_TERMINAL = (1.0, 0.25)
_LOG = (5.0, 20.0)


class Progress:
    """What is being done, and how much of it: a context around the work.

    what: as in "loading the base". total, unit: how many of what there are, where that is known and
    `add` counts them; else only the time is said.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", *, out: TextIO | None = None
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._out = sys.stderr if out is None else out
        self._is_terminal = self._out.isatty()
        self._has_spoken = False
        self._start = time.monotonic()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, *_: object) -> None:
        """Count one more; it takes, and leaves alone, whatever a callback is given."""
        self.done += 1

    def line(self, seconds: float) -> str:
        """Return what is said after so many seconds."""
        said = f"megalora: {self.what}"
        if self.total:
            said += f": {self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"
        elif self.done:
            said += f": {self.done:,} {self.unit}"
        said += f", {seconds:.0f} s"
        if self.total and 0 < self.done < self.total:
            said += f", about {seconds * (self.total / self.done - 1):.0f} s left"
        return said

    def __enter__(self) -> Self:
        """Start to speak, in a thread of its own, for the work may be one long call."""
        self._start = time.monotonic()
        if os.environ.get(QUIET) != "0" and os.environ.get("RANK", "0") == "0":
            self._thread = threading.Thread(target=self._speak, name="megalora-progress")
            self._thread.daemon = True
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End; a terminal's line is cleared, whatever comes then has said what came of it."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
        if self._has_spoken and self._is_terminal:
            self._write("\r\033[K")

    def _speak(self) -> None:
        first, every = _TERMINAL if self._is_terminal else _LOG
        wait = first
        while not self._ends.wait(wait):
            line = self.line(time.monotonic() - self._start)
            self._write(f"\r{line}\033[K" if self._is_terminal else f"{line}\n")
            self._has_spoken, wait = True, every

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
