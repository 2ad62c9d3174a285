"""A bound of the CPU time that a stranger's file may take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def soon(seconds: float = 5.0) -> Iterator[None]:
    """Fail where more CPU time is taken than a bound."""
    begin = time.process_time()
    yield
    took = time.process_time() - begin
    assert took < seconds, f"took {took:.1f} s"
