"""What some ranks find wrong is said on all of them."""

from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist


def on_all_ranks[T](work: Callable[[], T], *, only: int | None = None) -> T:
    """Do something on every rank, or on one, and return what it gives.

    only: the rank that alone works; all are told what it returns, which must be pickled. All ranks
    must call this. The first ValueError or OSError is raised on all of them, as a ValueError.
    """
    result, problem = None, None
    if only in (None, dist.get_rank()):
        try:
            result = work()
        except (OSError, ValueError) as error:
            problem = str(error)
    if only is None:
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    else:
        told: list[Any] = [result, problem]
        dist.broadcast_object_list(told, src=only)
        result, problem = told
    if problem is not None:
        raise ValueError(problem)
    return cast(T, result)
