"""Merge adapters into the base weights in place, and take them out again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.bases import Style


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


def base_weights(adapter: LoRAAdapter) -> list[Tensor]:
    """Return the local base weights that an adapter adds to, one for each local expert.

    Raises ValueError where one is shared (tied embeddings) or quantized.
    """
    base = adapter.base
    if base.style is Style.GROUPED and hasattr(base.module, "local_experts"):
        leaf = adapter.spec.name.rpartition(".")[2]
        weights = [getattr(expert, leaf).weight for expert in base.module.local_experts]
    else:
        weights = base.weights()
    for weight in weights:
        # The last pipeline stage has a copy of the first one's embedding, which alone is saved.
        if getattr(weight, "shared_embedding", False):
            raise ValueError(f"base weight of {adapter.spec.name} is shared: embeddings are tied")
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f"base weight of {adapter.spec.name} is {weight.dtype}: changing it needs 16 bits"
            )
    return weights


@torch.no_grad()
def change_base(adapter: LoRAAdapter, *, sign: float) -> None:
    """Add sign * c B A to every local base weight, computed in fp32 and rounded once."""
    for weight, update in zip(base_weights(adapter), _updates(adapter), strict=True):
        weight.copy_(weight.float().add_(update, alpha=sign))


def _updates(adapter: LoRAAdapter) -> list[Tensor]:
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
    found = list(named_adapters(model_chunks))
    for name, adapter in found:
        if adapter.enabled != enabled_before:
            what = "merged already" if enabled_before else "not merged"
            raise ValueError(f"{name} is {what}: call merge and unmerge in turn")
    check(model_chunks)
    for _, adapter in found:
        change_base(adapter, sign=sign)
        adapter.enabled = not enabled_before
