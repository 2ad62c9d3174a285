"""In which parts a world of ranks runs its tests, where there are cores for more than one."""

import os
from collections.abc import Sequence

# Of pytest-xdist; without it one process runs everything.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Of each world how many workers' cores one part takes; that of two ranks takes longest by far.
WORKERS_OF_A_PART = {1: 4, 2: 2, 4: 4}


def parts(world_size: int, workers: int) -> list[str]:
    """Return the names of a world's parts, as `2/4`: a single one on a small machine."""
    number = max(1, workers // WORKERS_OF_A_PART[world_size])
    return [f"{part}/{number}" for part in range(1, number + 1)]


def in_part[T](tests: Sequence[T], part: str, last: Sequence[T] = ()) -> list[T]:
    """Return the tests of a part, and behind them those that look back on all others of a run."""
    number, count = map(int, part.split("/"))
    others = [test for test in tests if test not in last]
    return [*others[number - 1 :: count], *last]
