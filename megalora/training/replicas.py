"""Ranks that hold the same part of the base must hold the same bits of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import ProcessGroup

from megalora.checkpoint.base import shards
from megalora.checkpoint.ranks import on_all_ranks
from megalora.training import agree

# Words of 8 bytes that are hashed at once: 2 MiB, which a CPU's cache holds.
_CHUNK = 1 << 18
_ODD = 0x1E3779B97F4A7C15


def check_replicas(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Raise ValueError on all ranks where two hold different bits of the same weights.

    Dense weights are compared over data- and context-parallel ranks, experts over
    expert-data-parallel ones, what tensor parallelism does not shard over tensor-parallel ranks,
    and tied embeddings over the first and last stage. All ranks must call it, before adapters are
    attached.
    """
    held = {_name(shard): shard for shard in shards(model_chunks)}
    bits = {name: f"{bits_of(shard.data) % 2**64:016x}" for name, shard in held.items()}

    def of(choice: Callable[[ShardedTensor], bool]) -> dict[str, str] | None:
        # A last stage without tied embeddings has no say on them.
        return {f"base weight {name}": bits[name] for name, s in held.items() if choice(s)} or None

    # Each in turn, whatever the one before has found: a group's ranks are not the next one's.
    problems = [agree.difference(of(choice), group) for choice, group in _groups()]
    on_all_ranks(lambda: _raise_first(problems))


def bits_of(tensor: torch.Tensor | None) -> int:
    """Return a sum over the 8-byte words of a tensor, each times an odd number of its place.

    One changed word always changes it.
    """
    assert tensor is not None
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start, words in zip(range(0, len(data), _CHUNK), data.split(_CHUNK), strict=True):
        places = torch.arange(start, start + len(words), device=data.device)
        total += (places.mul_(2 * _ODD).add_(1) * words).sum()
    return int(total)


def _name(shard: ShardedTensor) -> str:
    return f"{shard.key} at {list(shard.global_offset)}"


def _is_expert(shard: ShardedTensor) -> bool:
    return ".experts." in shard.key and ".shared_experts." not in shard.key


def _is_replicated(shard: ShardedTensor) -> bool:
    """Say whether all tensor-parallel ranks have this whole; layers are cut by pipeline stages."""
    own_axes = (shard.axis_fragmentations or ())[shard.prepend_axis_num :]
    return not _is_expert(shard) and all(parts == 1 for parts in own_axes)


def _is_embedding(shard: ShardedTensor) -> bool:
    return "word_embeddings.weight" in shard.key


def _groups() -> list[tuple[Callable[[ShardedTensor], bool], ProcessGroup]]:
    """Return which weights are the same on which ranks."""
    state: Any = parallel_state
    found = [
        (lambda s: not _is_expert(s), state.get_data_parallel_group(with_context_parallel=True)),
        (_is_expert, state.get_expert_data_parallel_group()),
        (_is_replicated, state.get_tensor_model_parallel_group()),
    ]
    if state.is_rank_in_embedding_group():
        # As a tied last stage holds it too.
        found.append((_is_embedding, state.get_embedding_group()))
    return found


def _raise_first(problems: Sequence[str | None]) -> None:
    for problem in filter(None, problems):
        raise ValueError(
            f"ranks disagree: {problem}: give every node the same files, and leave out a node "
            "that reads others"
        )
