"""The few functions of Megatron itself that ask a GPU for something and get none."""

import importlib
import logging
from typing import Any

import torch

from megalora.cpu import async_save


def install() -> None:
    """Import megatron.core under the facade and patch it."""
    _import_without_jit_fuser()
    _patch_rng()
    _patch_moe()
    async_save.install()


def _import_without_jit_fuser() -> None:
    """Import megatron.core while torch.compile does nothing.

    Megatron's jit_fuser is torch.compile. On a GPU it makes a Triton kernel; here it would start a
    C++ compiler for every small function that it decorates. User code keeps the real one.
    """
    patched: Any = torch
    compile_ = torch.compile
    patched.compile = lambda model=None, **kwargs: model if callable(model) else lambda f: f
    try:
        importlib.import_module("megatron.core.models.gpt")
    finally:
        patched.compile = compile_


def _patch_rng() -> None:
    import megatron.core.tensor_parallel.random as random

    patched: Any = random
    # It reaches for torch.cuda.default_generators, which is empty.
    patched._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    # The tracker warns when fork() changes the CPU generator; here that is its purpose.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_moe() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    patched: Any = token_dispatcher
    patched.maybe_move_tensor_to_cpu = _to_numpy


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Turn split sizes into numpy as asked; Megatron does so for CUDA tensors only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
