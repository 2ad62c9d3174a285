"""What TransformerEngine keeps for a process: no FP8, and states of random generators."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed


class FP8GlobalStateManager:
    """Say that nothing is in FP8: a plan is one of bf16."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Say that layers compute in bf16."""
        return False

    is_fp8_calibration = is_fp8_enabled

    @staticmethod
    def reset() -> None:
        """Do nothing."""


@contextlib.contextmanager
def in_bf16(*args: object, **kwargs: object) -> Iterator[None]:
    """Stand for TransformerEngine's FP8 contexts, in which a plan computes in bf16."""
    yield


class QuantizedTensor:
    """What no tensor of a plan is."""


class DelayedScaling:
    """The recipe that Megatron's own is a child of; a plan makes none."""


class CudaRNGStatesTracker:
    """Names of random generators: what they draw has no numbers."""

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all names."""
        self.states_ = {}

    def get_states(self) -> dict[str, Tensor]:
        """Return the states by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Take states by name."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """Add a generator."""
        self.states_[name] = torch.tensor([seed], device="cpu")

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from a generator in this context."""
        yield


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute a function in backward, as Megatron asks for under FP8 alone."""
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name, None)
    return recomputed(function, *args, use_reentrant=True, **kwargs)
