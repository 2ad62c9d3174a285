"""Merge adapters into the base weights in place, and take them out again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.finite import all_finite, largest, largest_update, refuse
from megalora.adapters.rows import join_projections, split_projections


def merge(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Add c B A to every base weight, in fp32, and switch the adapters off.

    All ranks must call it. Raises ValueError, before any weight is changed, where a weight is
    shared (tied embeddings), quantized, or merged already; and on all ranks where a sum would not
    be finite.
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
    """Return views of what an adapter adds to of the local base weights, one for each expert.

    Raises ValueError where one is shared (tied embeddings) or quantized.
    """
    weights = adapter.base.weights()
    for weight in weights:
        # The last pipeline stage has a copy of the first one's embedding, which alone is saved.
        if getattr(weight, "shared_embedding", False):
            raise ValueError(f"base weight of {adapter.spec.name} is shared: embeddings are tied")
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(
                f"base weight of {adapter.spec.name} is {weight.dtype}: changing it needs 16 bits"
            )
    return [weight[: adapter.own_rows] for weight in weights]


@torch.no_grad()
def change_base(adapter: LoRAAdapter, *, sign: float) -> None:
    """Add sign * c B A to every local base weight, computed in fp32 and rounded once."""
    for weight, update in zip(base_weights(adapter), _updates(adapter), strict=True):
        weight.copy_(weight.float().add_(update, alpha=sign))


def _updates(adapter: LoRAAdapter) -> list[Tensor]:
    """Return c B A in fp32 for each local weight of the base, [o/split, i/split]."""
    return [_update(adapter, a, b) for a, b in adapter.full_pairs()]


def _update(adapter: LoRAAdapter, a: Tensor, b: Tensor) -> Tensor:
    return adapter.spec.scale * _product(a.float(), b.float(), adapter.segments())


def _product(a: Tensor, b: Tensor, segments: list[int]) -> Tensor:
    """Return B A where each block of B's rows meets its projection's rows of A."""
    own = zip(split_projections(b, segments), a.split(b.shape[1]), strict=True)
    return join_projections([b_rows @ a_rows for b_rows, a_rows in own], segments)


@torch.no_grad()
def _has_finite_sums(adapter: LoRAAdapter, *, sign: float) -> bool:
    """Say whether every W + sign * c B A is finite in the precision of W.

    All ranks must call it. Bounds decide, and only where they are too large the sum itself.
    """
    fits = True
    for weight, (a, b) in zip(base_weights(adapter), adapter.full_pairs(), strict=True):
        bound = largest(weight) + largest_update(a, b, adapter.spec.scale)
        if not bound < torch.finfo(weight.dtype).max:
            total = weight.float().add(_update(adapter, a, b), alpha=sign)
            fits &= all_finite(total.to(weight.dtype))
    return fits


def _change(model_chunks: Sequence[torch.nn.Module], *, sign: float, enabled_before: bool) -> None:
    found = list(named_adapters(model_chunks))
    for name, adapter in found:
        if adapter.enabled != enabled_before:
            what = "merged already" if enabled_before else "not merged"
            raise ValueError(f"{name} is {what}: call merge and unmerge in turn")
    check(model_chunks)
    refuse(
        {adapter.spec.name for _, adapter in found if not _has_finite_sums(adapter, sign=sign)},
        "base and adapter cannot be merged: NaN or infinities are in one of them, or would be in "
        "their sum in the base's precision, of {}".format,
    )
    for _, adapter in found:
        change_base(adapter, sign=sign)
        adapter.enabled = not enabled_before
