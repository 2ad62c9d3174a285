"""The few functions of Megatron itself that ask a GPU for something and get none.

To be imported inside of `cuda_facade.without_jit_fuser`: it imports megatron.core.
"""

import logging

import megatron.core.models.gpt  # noqa: F401
import numpy as np
import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import token_dispatcher

from megalora.cpu import async_save
from megalora.replace import Patch, instead


def quiet_tracker() -> None:
    """Silence the tracker of generators' states.

    It warns when fork() changes the CPU generator; here that is its purpose.
    """
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """Set the state of the CPU generator, whichever GPU's is meant."""
    torch.set_rng_state(new_state)


def to_numpy(
    tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False
) -> torch.Tensor | np.ndarray:
    """Turn split sizes into numpy as asked; Megatron does so for CUDA tensors only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


PATCHES = (
    Patch(
        random,
        "_set_cuda_rng_state",
        ("new_state", "device", "graph_safe"),
        instead(set_rng_state),
        "it reaches for torch.cuda.default_generators, which is empty",
    ),
    Patch(
        token_dispatcher,
        "maybe_move_tensor_to_cpu",
        ("tensor", "as_numpy", "record_stream"),
        instead(to_numpy),
        "it turns CUDA tensors into numpy, and no others",
    ),
    *async_save.PATCHES,
)
