"""What takes a moment, such as the end of a killed process."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition; fail where it does not hold in time."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
