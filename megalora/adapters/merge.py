"""Merge adapters into the base weights in place, and take them out again."""

from collections.abc import Sequence

import torch

from megalora.adapters.updates import base_weights, change_base
from megalora.builder import named_adapters


def merge(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Add c B A to every base weight, in fp32, and switch the adapters off.

    All ranks must call it. Raises ValueError, before any weight is changed, where a weight is
    shared (tied embeddings), quantized, or merged already.
    """
    _change(model_chunks, sign=1.0, enabled_before=True)


def unmerge(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Subtract c B A from every base weight and switch the adapters on: the reverse of merge.

    In bf16 the weights come back only up to rounding.
    """
    _change(model_chunks, sign=-1.0, enabled_before=False)


def check(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Raise ValueError where `merge` would, on this rank."""
    for _, adapter in named_adapters(model_chunks):
        base_weights(adapter)


def _change(model_chunks: Sequence[torch.nn.Module], *, sign: float, enabled_before: bool) -> None:
    found = list(named_adapters(model_chunks))
    for name, adapter in found:
        if adapter.enabled != enabled_before:
            what = "merged already" if enabled_before else "not merged"
            raise ValueError(f"{name} is {what}: call merge and unmerge in turn")
    check(model_chunks)
    for _, adapter in found:
        change_base(adapter, sign=sign)
        adapter.enabled = not enabled_before
