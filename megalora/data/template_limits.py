"""How long a chat template may take, which is a program and may be a stranger's, and its errors.

It runs in the sandbox of jinja2 that transformers has, where it reaches nothing of Python's.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Far more than any chat takes.
SECONDS = 20.0


@contextmanager
def template_errors() -> Iterator[None]:
    """Raise ValueError for whatever the expressions of a template do, also for ever."""
    try:
        with time_limit():
            yield
    except Exception as error:
        raise ValueError(
            f"the chat template refuses it ({type(error).__name__}: {error}): change the row "
            "or give another --chat-template"
        ) from error


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError in what takes longer than `SECONDS`; other threads cannot be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    others = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, before)
