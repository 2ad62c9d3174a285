"""What some ranks find wrong is said on all of them."""

from collections.abc import Callable
from typing import cast

import torch.distributed as dist

from megalora.adapters.world import first_rank, told_by


def on_all_ranks[T](work: Callable[[], T], *, only: int | None = None) -> T:
    """Do something on every rank, or on one, and return what it gives.

    only: the rank that alone works; all are told what it returns, which must be pickled. All ranks
    must call this. The first ValueError or OSError is raised on all of them, as a ValueError; where
    there is none, ranks that all work tell each other no more than that.
    """
    result, problem = None, None
    if only in (None, dist.get_rank()):
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = str(error)
    if only is None:
        speaker = first_rank(problem is not None)
        problem = None if speaker is None else told_by(speaker, problem)
    else:
        result, problem = told_by(only, (result, problem))
    if problem is not None:
        raise ValueError(problem)
    return cast(T, result)
