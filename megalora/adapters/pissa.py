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
from megalora.adapters.collectives import start_gather
from megalora.adapters.finite import all_finite, refuse
from megalora.adapters.merge import base_weights, change_base
from megalora.adapters.rows import fit_padding, join_projections, split_projections, to_whole


def start_from_base(
    model_chunks: Sequence[torch.nn.Module], *, vocab_size: int | None = None
) -> None:
    """Split every adapted base weight into its adapter and a residual.

    vocab_size: rows of the unembedding that are tokens; the others then stay in the base.
    All ranks must call it, once after each loading of base weights and before adapters are loaded.
    The product c B A is the same on every layout, so a base that is loaded again gives the same
    residual. Raises ValueError, before any weight is changed, where a rank exceeds its projection's
    smaller side, or where a base weight cannot be changed or is not finite; and on all ranks, too
    late for the base, where start values are beyond the adapters' precision.
    """
    found = [
        module
        for chunk in model_chunks
        for module in chunk.modules()
        if isinstance(module, LoRAAdapter) and module.config.init == "pissa"
    ]
    for adapter in found:
        _check(adapter)
    refuse(
        {a.spec.name for a in found if not all(map(all_finite, base_weights(a)))},
        "lora_init pissa needs finite base weights: NaN or infinities are in {}".format,
    )
    for adapter in found:
        _split(adapter, vocab_size if adapter.spec.rows.padded else None)
    refuse(
        {a.spec.name for a in found if not all(all_finite(param) for param, _ in a.factors())},
        "lora_init pissa starts beyond the adapters' precision at this lora_alpha, in {}".format,
    )


@contextlib.contextmanager
def at_start(model_chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Give the adapters their start values for a while, as an export of the difference needs.

    The base lost c B₀ A₀, so an ordinary adapter of the original base is that of rank 2r with
    A = [A; A₀] and B = [B, -B₀].
    """
    held = []
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAAdapter):
                for name, start in module.start.items():
                    param = module.get_parameter(name)
                    held.append((param, param.data))
                    param.data = start.to(param.device)
    try:
        yield
    finally:
        for param, data in held:
            param.data = data


def _check(adapter: LoRAAdapter) -> None:
    base_weights(adapter)
    limit = min(*adapter.spec.rows.by_projection, adapter.base.in_features)
    if adapter.spec.rank > limit:
        raise ValueError(
            f"lora_rank {adapter.spec.rank} exceeds the {limit} singular values of a projection of "
            f"{adapter.spec.name}: use at most {limit}, or lora_init uniform"
        )


@torch.no_grad()
def _split(adapter: LoRAAdapter, vocab_size: int | None) -> None:
    # Without the padding: how many rows it has, and what is in them, depends on the layout.
    wholes = [_whole(adapter, weight)[:vocab_size] for weight in base_weights(adapter)]
    pairs = [_decompose(adapter, whole) for whole in wholes]
    for name, whole in zip(("lora_A", "lora_B"), zip(*pairs, strict=True), strict=True):
        stacked = torch.stack(whole) if adapter.base.num_experts else whole[0]
        adapter.get_parameter(name).copy_(adapter.shardings[name].shard_features(stacked))
    change_base(adapter, sign=-1.0)
    adapter.start = {
        sharding.factor.name: param.detach().cpu().clone() for param, sharding in adapter.factors()
    }


def _whole(adapter: LoRAAdapter, weight: Tensor) -> Tensor:
    """Return a base weight [o, i] in fp32, gathered over the ranks that split it."""
    base, weight = adapter.base, weight.float()
    if base.split is Split.DUPLICATED:
        return weight
    dim = -1 if base.split is Split.ROW else -2
    ranks = start_gather(weight, dim, base.group).wait()
    return ranks if dim == -1 else to_whole(ranks, adapter.spec.rows, base.tp_size, dim)


def _decompose(adapter: LoRAAdapter, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [P r, i] and B [o, r] of one weight [o, i], which may lack rows of padding."""
    rank, period = adapter.spec.rank, adapter.spec.rows.period
    all_a, all_b = [], []
    for rows in split_projections(weight, period):
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        root = (s[:rank] / adapter.spec.scale).sqrt()
        all_a.append(root[:, None] * vh[:rank])
        all_b.append(u[:, :rank] * root)
    b = join_projections(all_b, period)
    return torch.cat(all_a), fit_padding(b, adapter.spec.rows, -2)
