"""PiSSA: adapters start as the leading singular triplets of their base, which keeps the residual.

The first r triplets of W = U S Vᵀ, of each Hugging Face projection, give A = sqrt(S/c) Vᵀ and
B = U sqrt(S/c); W - c B A stays in the base. The model's output does not change.
Source: Meng et al., "PiSSA", NeurIPS 2024.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split
from megalora.adapters.collectives import group_size, own_shard, start_gather
from megalora.adapters.merge import base_weights, change_base
from megalora.adapters.rows import in_rank_order, in_whole_order
from megalora.ops.reference import owners


def start_from_base(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Split every adapted base weight into its adapter and a residual.

    All ranks must call it, once after each loading of base weights and before adapters are loaded.
    The product c B A is the same on every layout, so a base that is loaded again gives the same
    residual. Raises ValueError, before any weight is changed, where a rank exceeds its projection's
    smaller side, or where a base weight cannot be changed.
    """
    found = [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, LoRAAdapter) and module.config.init == "pissa"
    ]
    for adapter in found:
        _check(adapter)
    for adapter in found:
        _split(adapter)


@contextlib.contextmanager
def at_start(model_chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Give the adapters their start values for a while, as an export of the difference needs.

    The base lost c B₀ A₀, so an ordinary adapter of the original base is that of rank 2r with
    A = [A; A₀] and B = [B, -B₀].
    """
    held = []
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAAdapter) and module.start is not None:
                for param, start in zip((module.lora_A, module.lora_B), module.start, strict=True):
                    held.append((param, param.data))
                    param.data = start.to(param.device)
    try:
        yield
    finally:
        for param, data in held:
            param.data = data


def _check(adapter: LoRAAdapter) -> None:
    base_weights(adapter)
    rows = torch.bincount(_row_projections(adapter, torch.device("cpu")))
    limit = min(int(rows.min()), adapter.base.in_features)
    if adapter.spec.rank > limit:
        raise ValueError(
            f"lora_rank {adapter.spec.rank} exceeds the {limit} singular values of a projection of "
            f"{adapter.spec.name}: use at most {limit}, or lora_init uniform"
        )


@torch.no_grad()
def _split(adapter: LoRAAdapter) -> None:
    factors = [_decompose(adapter, _whole(adapter, w)) for w in base_weights(adapter)]
    a = torch.stack([a for a, _ in factors]) if adapter.base.num_experts else factors[0][0]
    b = torch.stack([b for _, b in factors]) if adapter.base.num_experts else factors[0][1]
    if parts := adapter.spec.parts:
        b = in_rank_order(b, parts, group_size(adapter.b_group))
    adapter.lora_A.copy_(own_shard(a, -1, adapter.a_group))
    adapter.lora_B.copy_(own_shard(b.view(adapter.b_shape()), -2, adapter.b_group))
    change_base(adapter, sign=-1.0)
    adapter.start = (adapter.lora_A.detach().cpu().clone(), adapter.lora_B.detach().cpu().clone())


def _whole(adapter: LoRAAdapter, weight: Tensor) -> Tensor:
    """Return a base weight [o, i] in fp32, gathered over the ranks that split it."""
    base, weight = adapter.base, weight.float()
    if base.split is Split.DUPLICATED:
        return weight
    if base.split is Split.ROW:
        return start_gather(weight, -1, base.group).wait()
    if adapter.spec.gated:
        # This rank holds [gate_k; up_k].
        weight = weight.unflatten(0, (2, -1))
        return start_gather(weight, -2, base.group).wait().flatten(0, 1)
    whole = start_gather(weight, -2, base.group).wait()
    parts = adapter.spec.parts
    return in_whole_order(whole, parts, base.tp_size) if parts else whole


def _decompose(adapter: LoRAAdapter, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [P r, i] and B [o, r] of one weight [o, i]."""
    projection = _row_projections(adapter, weight.device)
    b = weight.new_empty(weight.shape[0], adapter.spec.rank)
    all_a = []
    for index in range(adapter.spec.num_projections):
        rows = projection == index
        u, s, vh = torch.linalg.svd(weight[rows], full_matrices=False)
        root = (s[: adapter.spec.rank] / adapter.spec.scale).sqrt()
        b[rows] = u[:, : adapter.spec.rank] * root
        all_a.append(root[:, None] * vh[: adapter.spec.rank])
    return torch.cat(all_a), b


def _row_projections(adapter: LoRAAdapter, device: torch.device) -> Tensor:
    """Return the projection of each global output row, int64 [o]."""
    return owners(adapter.spec.segments, adapter.base.out_features, device)
