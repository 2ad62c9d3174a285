"""Whole adapters of a running model: gathered on one rank, loaded on all, and their shapes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.adapter import named_adapters
from megalora.adapters.collectives import group_size, union
from megalora.adapters.factors import Sharding
from megalora.adapters.finite import all_finite, refuse


def gather_adapters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Return all adapter tensors of the model, unsharded, on rank 0 (an empty dict elsewhere).

    Keys are global names such as `decoder.layers.3.mlp.linear_fc1_lora.lora_A`; output rows are in
    the order of the whole, as gate before up or z, x, B, C and dt; experts come first, [E, ...]. On
    the CPU. All ranks must call it.
    """
    own = {
        key: sharding.gather(param.detach()).cpu()
        for key, param, sharding in _factors(model_chunks)
    }
    stages = _pipeline()
    if group_size(stages) == 1:
        return own if dist.get_rank() == 0 else {}
    # Of all pipelines, the one that rank 0 is the first stage of.
    if 0 not in dist.get_process_group_ranks(stages):
        return {}
    gathered: list[dict[str, Tensor]] | None = None
    if dist.get_rank() == 0:
        gathered = [{} for _ in range(group_size(stages))]
    dist.gather_object(own, gathered, dst=0, group=stages)
    return {key: tensor for stage in gathered or [] for key, tensor in stage.items()}


def whole_shapes(model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[int]]:
    """Return the names and shapes of what `gather_adapters` returns, on every rank.

    All ranks must call it.
    """
    own = {key: list(sharding.whole_shape()) for key, _, sharding in _factors(model_chunks)}
    everywhere: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own)
    return {name: shape for rank in everywhere for name, shape in rank.items()}


def load_adapters(
    model_chunks: Sequence[torch.nn.Module],
    tensors: Mapping[str, Tensor],
    *,
    allow_missing: bool = False,
) -> None:
    """Set the adapters of a model from unsharded tensors.

    Every rank gives the same tensors, with `gather_adapters`' keys and shapes, and keeps its
    shards. All ranks must call it. Raises ValueError, before anything is changed, where a tensor is
    missing (unless allow_missing), belongs to no adapter of the model, has another shape, or is not
    finite in the adapter's precision.
    """
    own = list(_factors(model_chunks))
    whole = union({key for key, _, _ in own}, _pipeline())
    missing, unknown = sorted(whole - set(tensors)), sorted(set(tensors) - whole)
    if missing and not allow_missing:
        raise ValueError(f"adapter tensors are missing: {_first(missing)}")
    if unknown:
        raise ValueError(
            f"the model has no adapter for {_first(unknown)}: add their modules to "
            "--lora-targets, or leave the tensors out"
        )
    writes = {
        key: (param, sharding.shard(sharding.fit(tensors[key], key)).to(param.dtype))
        for key, param, sharding in own
        if key in tensors
    }
    refuse(
        {f"{key} as {v.dtype}" for key, (_, v) in writes.items() if not all_finite(v)},
        "adapter to load has NaN or infinite values in {}: it diverged, or is beyond this "
        "precision".format,
    )
    with torch.no_grad():
        for param, value in writes.values():
            param.copy_(value)


def _factors(
    model_chunks: Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Parameter, Sharding]]:
    """Yield key, shard and sharding of every factor that this rank has a part of."""
    for name, adapter in named_adapters(model_chunks):
        for param, sharding in adapter.factors():
            yield f"{name}.{sharding.factor.name}", param, sharding


def _pipeline() -> ProcessGroup:
    group = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(group, ProcessGroup)
    return group


def _first(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))
