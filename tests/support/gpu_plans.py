"""Plans as a GPU runs them: a process of its own finds TransformerEngine's layers, as shapes.

The tests' server has imported Megatron without them. Each call runs in a fork of that process.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import sys
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest


def call[R](function: Callable[..., R], *args: object) -> R:
    """Return what a function of a test's module returns in a process that plans for a GPU."""
    server = _server()
    server.send((function, args))
    done, result = server.recv()
    if not done:
        pytest.fail(result, pytrace=False)
    return result


@functools.cache
def _server() -> Connection:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=_serve, args=(theirs,), daemon=True).start()
    theirs.close()
    return ours


def _serve(pipe: Connection) -> None:
    from megalora.plan import world

    world.install()
    # What every plan would import.
    from megatron.core.tokenizers.text import libraries  # noqa: F401

    from megalora.plan import rank  # noqa: F401

    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            child = os.fork()
            if not child:
                _answer(pipe, function, args)
            if os.waitpid(child, 0)[1]:
                pipe.send((False, "the process that plans ended"))


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # A spawned process has the tests' main module, which a launch script would write into.
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = True, function(*args)
    except BaseException:
        result = False, traceback.format_exc()
    pipe.send(result)
    os._exit(0)
