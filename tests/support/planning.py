"""`megalora plan` in a process that the tests' server forked, as on a command line."""

import contextlib
import io
import os
import sys
import types
from collections.abc import Sequence
from typing import NamedTuple

from tests.support import forked
from tests.support.plans import COMMON, SIZES

TINY = (*COMMON, *SIZES)
# What opens a file to write, or changes a directory, by Python's own audit of it.
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Ended(NamedTuple):
    """How a command ended, what it printed, and what its processes changed in the file system."""

    status: int
    out: str
    err: str
    changed: list[str]


def plan(*words: object) -> Ended:
    """Run the command with these words after `megalora plan`."""
    return forked.call(plan_here, tuple(map(str, words)))


def plan_here(words: Sequence[str]) -> Ended:
    """Run the command in this process, which has Megatron imported."""
    from megalora.__main__ import main

    sys.modules["__main__"] = types.ModuleType("__main__")
    # Its code may not be compiled yet, which Python writes down.
    sys.dont_write_bytecode = True
    log = os.fdopen(os.memfd_create("changed"), "w+")
    _watch(log)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", *words])
    log.seek(0)
    return Ended(status, out.getvalue(), err.getvalue(), log.read().splitlines())


def _watch(log: io.TextIOBase) -> None:
    """Write down, also in processes forked from this one, what changes files."""

    def hear(event: str, given: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & _WRITING
        place = str(given[0]) if given else ""
        # A number is of a file that is open already.
        if (writes or event in _CHANGES) and not place.isdigit() and place != "/dev/null":
            os.write(log.fileno(), f"{event} {place}\n".encode())

    sys.addaudithook(hear)
