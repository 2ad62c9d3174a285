"""Asynchronous checkpoints on the CPU: Megatron's writing process is built for tensors on GPUs."""

from typing import Any

import torch


def install() -> None:
    """Fork the writer, and hand it copies of the tensors."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    patched: Any = PersistentAsyncCaller
    start, schedule = patched._get_process.__func__, patched.schedule_async_call

    def start_forked(cls: Any, rank: int, mp_mode: str = "spawn", *qos: Any, **kwargs: Any) -> Any:
        # Megatron starts it anew, for a CUDA context of its own. Here it would not have the facade,
        # and it would import Megatron once more; no process group exists yet.
        return start(cls, rank, "fork", *qos, **kwargs)

    def schedule_copy(self: Any, request: Any) -> None:
        # Megatron waits until the writer has copied from the GPU. A tensor on the CPU is no copy
        # there but the trainer's own memory, shared: the file would get the next iteration's.
        if request.preload_fn is not None:
            rank, _, results = request.async_fn_args
            copies = _copied(request.preload_fn())
            request = request._replace(async_fn_args=[rank, copies, results], preload_fn=None)
        schedule(self, request)

    patched._get_process = classmethod(start_forked)
    patched.schedule_async_call = schedule_copy


def _copied(buckets: list[Any]) -> list[Any]:
    """Copy the tensors of (path, key, ([(item, bytes)], [(item, tensor)]))."""
    return [
        (path, key, (blobs, [(item, _clone(tensor)) for item, tensor in tensors]))
        for path, key, (blobs, tensors) in buckets
    ]


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
