"""Norms of the adapters of a running model, and of the frozen weights below them.

Of a factor that is sharded over ranks, the Gram matrices [r, r] are summed, never its features
gathered. One matrix is what has an A of its own: a projection of a fused linear, of each expert.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split
from megalora.adapters.collectives import group_size, own_shard
from megalora.adapters.grams import Norms, gram, norms
from megalora.adapters.rows import to_ranks
from megalora.targets import Rows

# Elements of Gram matrices that are summed at once: 64 MiB in fp64. Up to rank 32 that is nearly
# always all of a model.
_AT_ONCE = 1 << 23
# Rows of a weight that are squared at a time.
_ROWS = 1 << 12


@dataclass(frozen=True, slots=True)
class Measured:
    """Norms of an adapter's matrices [n], on the CPU; the same on all ranks that have a part."""

    adapter: LoRAAdapter
    norms: Norms

    @property
    def holders(self) -> int:
        """Return how many ranks have these numbers: replicas, and those that share the base."""
        if self.adapter.base.is_expert:
            shared = parallel_state.get_expert_tensor_parallel_world_size() or 1
            return shared * parallel_state.get_expert_data_parallel_world_size()
        replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return replicas * parallel_state.get_tensor_model_parallel_world_size()


@torch.no_grad()
def measure(adapters: Iterable[LoRAAdapter]) -> Iterator[Measured]:
    """Yield the norms of adapters in their order; all ranks that share them must take all.

    Costs an all-reduce of the Gram matrices for each tensor-parallel group.
    """
    held: list[tuple[LoRAAdapter, Tensor, Tensor]] = []
    for adapter in adapters:
        held.append((adapter, *_grams(adapter)))
        if sum(a.numel() + b.numel() for _, a, b in held) >= _AT_ONCE:
            yield from _measured(held)
            held = []
    yield from _measured(held)


@torch.no_grad()
def weight_norms(chunks: Sequence[Any], adapters: Sequence[LoRAAdapter]) -> list[Tensor]:
    """Return Frobenius norms [n] of the frozen weights below adapters' matrices, on the CPU.

    NaN where a weight gives no numbers. chunks: unwrapped model chunks, whose embeddings are the
    weight of a tied output layer. All ranks that share the weights must call it: an all-reduce of n
    numbers for each group.
    """
    squares = [_squares(chunks, adapter) for adapter in adapters]
    cut = [adapter.base.split is not Split.DUPLICATED for adapter in adapters]
    groups = [a.base.group if c else None for a, c in zip(adapters, cut, strict=True)]
    return [square.sqrt().cpu() for square in _summed(squares, groups)]


def _grams(adapter: LoRAAdapter) -> tuple[Tensor, Tensor]:
    """Return this rank's part of A Aᵀ and BᵀB [(E,) P, r, r]."""
    a, b = (factor.detach() for factor in adapter.pair())
    spec = adapter.spec
    of_a = gram(a.unflatten(-2, (spec.num_projections, spec.rank)).mT)
    if spec.num_projections == 1:
        return of_a, gram(b).unsqueeze(-3)
    numbers = _projections(spec.rows, adapter.b_group).to(b.device)
    each = [gram(b[..., numbers == p, :]) for p in range(spec.num_projections)]
    return of_a, torch.stack(each, -3)


def _measured(held: list[tuple[LoRAAdapter, Tensor, Tensor]]) -> Iterator[Measured]:
    """Sum Gram matrices over ranks, and compute the norms of all that have one rank at once."""
    grams = [each for _, a, b in held for each in (a, b)]
    groups = [group for adapter, _, _ in held for group in (adapter.a_group, adapter.b_group)]
    summed = iter(_summed(grams, groups))
    # A factor that experts share is each one's.
    pairs = [torch.broadcast_tensors(a, b) for a, b in zip(summed, summed, strict=True)]
    flat = [[each.flatten(0, -3) for each in pair] for pair in pairs]
    found: dict[int, Norms] = {}
    for rank in {adapter.spec.rank for adapter, _, _ in held}:
        places = [n for n, (adapter, _, _) in enumerate(held) if adapter.spec.rank == rank]
        a, b = (torch.cat([flat[n][k] for n in places]) for k in (0, 1))
        counts = [len(flat[n][0]) for n in places]
        each = zip(*(norm.cpu().split(counts) for norm in norms(a, b)), strict=True)
        found |= {n: Norms(*own) for n, own in zip(places, each, strict=True)}
    for n, (adapter, _, _) in enumerate(held):
        yield Measured(adapter, found[n])


def _summed(own: list[Tensor], groups: Sequence[ProcessGroup | None]) -> list[Tensor]:
    """Return the sums of tensors over the group of each, by one all-reduce for each group."""
    found = list(own)
    for group in dict.fromkeys(group for group in groups if group_size(group) > 1):
        places = [n for n, other in enumerate(groups) if other is group]
        flat = torch.cat([own[n].flatten() for n in places])
        dist.all_reduce(flat, group=group)
        parts = flat.split([own[n].numel() for n in places])
        for n, part in zip(places, parts, strict=True):
            found[n] = part.view_as(own[n])
    return found


def _projections(rows: Rows, group: ProcessGroup | None) -> Tensor:
    """Return the number of the projection that each output row of this rank belongs to."""
    period = torch.tensor(rows.period or (rows.size,))
    numbers = torch.arange(len(period)).repeat_interleave(period)
    whole = numbers.repeat(rows.size // int(period.sum()))
    return own_shard(to_ranks(whole, rows, group_size(group), -1), -1, group)


def _squares(chunks: Sequence[Any], adapter: LoRAAdapter) -> Tensor:
    """Return sums of squares of this rank's part of the weights, by matrix [n]."""
    split = adapter.base.split
    group = adapter.base.group if split is Split.COLUMN else None
    spec, found = adapter.spec, []
    for weight in _weights(chunks, adapter):
        # TransformerEngine's eight-bit tensors give the numbers that they stand for, others none.
        readable = weight.is_floating_point() and weight.element_size() > 1
        numbers = _projections(spec.rows, group).to(weight.device)
        total = torch.zeros(spec.num_projections, dtype=torch.float64, device=weight.device)
        parts = weight.detach()[: adapter.own_rows].split(_ROWS) if readable else ()
        for part, own in zip(parts, numbers.split(_ROWS), strict=False):
            total.index_add_(0, own, part.double().square().sum(1))
        found.append(total if readable else total + torch.nan)
    return torch.cat(found)


def _weights(chunks: Sequence[Any], adapter: LoRAAdapter) -> list[Tensor]:
    base = adapter.base
    if base.num_experts == 0 and base.module.weight is None:
        (chunk,) = (c for c in chunks if getattr(c, "output_layer", None) is base.module)
        return [chunk.shared_embedding_or_output_weight()]
    return base.weights()
