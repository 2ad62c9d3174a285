"""Merge adapters into the base weights in place, and take them out again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalora.adapters import LoRAAdapter
from megalora.bases import Style
from megalora.builder import adapters


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


def weight_updates(adapter: LoRAAdapter) -> list[Tensor]:
    """Return c B A in fp32 for each local weight of the base, [o/split, i/split]."""
    a, b = (factor.float() for factor in adapter.full_factors())
    num = max(1, adapter.base.num_experts)
    a_list = a.unbind(0) if adapter.a_experts else (a,) * num
    b_list = b.unbind(0) if adapter.b_experts else (b,) * num
    segments = adapter.segments()
    return [
        adapter.spec.scale * _product(a, b, segments) for a, b in zip(a_list, b_list, strict=True)
    ]


def _product(a: Tensor, b: Tensor, segments: list[int]) -> Tensor:
    """Return B A where each block of B's rows meets its projection's rows of A."""
    if not segments:
        return b @ a
    rank = b.shape[1]
    periods = b.view(-1, sum(segments), rank)
    blocks = zip(periods.split(segments, 1), a.split(rank, 0), strict=True)
    return torch.cat([b_block @ a_block for b_block, a_block in blocks], 1).flatten(0, 1)


def _change(model_chunks: Sequence[torch.nn.Module], *, sign: float, enabled_before: bool) -> None:
    found = list(adapters(model_chunks))
    for name, adapter in found:
        if adapter.enabled != enabled_before:
            what = "merged already" if enabled_before else "not merged"
            raise ValueError(f"{name} is {what}: call merge and unmerge in turn")
        for weight in base_weights(adapter):
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(f"base weight of {name} is {weight.dtype}: merge needs 16 bits")
    with torch.no_grad():
        for _, adapter in found:
            updates = weight_updates(adapter)
            for weight, update in zip(base_weights(adapter), updates, strict=True):
                weight.copy_(weight.float().add_(update, alpha=sign))
            adapter.enabled = not enabled_before


def base_weights(adapter: LoRAAdapter) -> list[torch.Tensor]:
    """Return the local base weights that an adapter adds to, one for each local expert."""
    base = adapter.base
    if base.style is Style.GROUPED and hasattr(base.module, "local_experts"):
        leaf = adapter.spec.name.rpartition(".")[2]
        return [getattr(expert, leaf).weight for expert in base.module.local_experts]
    return base.weights()
