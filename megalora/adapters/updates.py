"""The update c B A of each base weight, as this rank holds it."""

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Style


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


def change_base(adapter: LoRAAdapter, *, sign: float) -> None:
    """Add sign * c B A to every local base weight, computed in fp32 and rounded once."""
    with torch.no_grad():
        updates = weight_updates(adapter)
        for weight, update in zip(base_weights(adapter), updates, strict=True):
            weight.copy_(weight.float().add_(update, alpha=sign))


def _product(a: Tensor, b: Tensor, segments: list[int]) -> Tensor:
    """Return B A where each block of B's rows meets its projection's rows of A."""
    if not segments:
        return b @ a
    rank = b.shape[1]
    periods = b.view(-1, sum(segments), rank)
    blocks = zip(periods.split(segments, 1), a.split(rank, 0), strict=True)
    return torch.cat([b_block @ a_block for b_block, a_block in blocks], 1).flatten(0, 1)
