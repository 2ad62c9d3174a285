"""Asynchronous checkpoints on the CPU: Megatron's writing process is built for tensors on GPUs."""

from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncRequest,
    PersistentAsyncCaller,
)

from megalora.replace import Patch, around

# Of one file: path, key, ([(item, bytes)], [(item, tensor)]).
Bucket = tuple[
    object, object, tuple[list[tuple[object, object]], list[tuple[object, torch.Tensor]]]
]


def start_forked(
    start: Callable[..., BaseProcess],
    cls: type[PersistentAsyncCaller],
    rank: int,
    mp_mode: str = "spawn",
    *qos: object,
    **kwargs: object,
) -> BaseProcess:
    """Fork the writer.

    Megatron starts it anew, for a CUDA context of its own. Here it would not have the facade, and
    it would import Megatron once more; no process group exists yet.
    """
    return start(cls, rank, "fork", *qos, **kwargs)


def schedule_copy(
    schedule: Callable[[PersistentAsyncCaller, AsyncRequest], None],
    self: PersistentAsyncCaller,
    async_req: AsyncRequest,
) -> None:
    """Hand the writer copies of the tensors.

    Megatron waits until the writer has copied from the GPU. A tensor on the CPU is no copy there
    but the trainer's own memory, shared: the file would get the next iteration's.
    """
    if async_req.preload_fn is not None:
        rank, _, results = async_req.async_fn_args
        copies = _copied(async_req.preload_fn())
        async_req = async_req._replace(async_fn_args=[rank, copies, results], preload_fn=None)
    schedule(self, async_req)


def _copied(buckets: list[Bucket]) -> list[Bucket]:
    return [
        (path, key, (blobs, [(item, tensor.detach().clone()) for item, tensor in tensors]))
        for path, key, (blobs, tensors) in buckets
    ]


PATCHES = (
    Patch(
        PersistentAsyncCaller,
        "_get_process",
        ("rank", "mp_mode"),
        around(start_forked),
        "a spawned writer is without the facade of CUDA devices",
    ),
    Patch(
        PersistentAsyncCaller,
        "schedule_async_call",
        ("async_req",),
        around(schedule_copy),
        "tensors on the CPU would reach the writer as shared memory",
    ),
)
