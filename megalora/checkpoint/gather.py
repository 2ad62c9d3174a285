"""Whole adapters of a running model: gathered on one rank, loaded on all, and their shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.collectives import group_size, own_shard, start_gather, union
from megalora.adapters.rows import in_rank_order, in_whole_order


def gather_adapters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Return all adapter tensors of the model, unsharded, on rank 0 (an empty dict elsewhere).

    Keys are global names such as `decoder.layers.3.mlp.linear_fc1_lora.lora_A`; a gated lora_B is
    [2 f, r], gate before up; that of Mamba's in_proj has the rows of z, x, B, C and dt; experts
    come first, [E, ...]. On the CPU. All ranks must call it.
    """
    own: dict[str, Tensor] = {}
    for name, adapter in named_adapters(model_chunks):
        own[f"{name}.lora_A"] = _unshard(adapter, adapter.lora_A, -1)
        own[f"{name}.lora_B"] = _unshard(adapter, adapter.lora_B, -2)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if group_size(stages) == 1:  # type: ignore[arg-type]
        return own if dist.get_rank() == 0 else {}
    # Of all pipelines, the one that rank 0 is the first stage of.
    if 0 not in dist.get_process_group_ranks(stages):  # type: ignore[arg-type]
        return {}
    gathered: list[dict[str, Tensor]] | None = None
    if dist.get_rank() == 0:
        gathered = [{} for _ in range(group_size(stages))]  # type: ignore[arg-type]
    dist.gather_object(own, gathered, dst=0, group=stages)  # type: ignore[arg-type]
    return {key: tensor for stage in gathered or [] for key, tensor in stage.items()}


def whole_shapes(model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[int]]:
    """Return the names and shapes of what `gather_adapters` returns, on every rank.

    All ranks must call it.
    """
    own = {
        f"{name}.{factor}": _flat_shape(adapter, dim)
        for name, adapter in named_adapters(model_chunks)
        for factor, dim in (("lora_A", -1), ("lora_B", -2))
    }
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
    missing (unless allow_missing), belongs to no adapter of the model, or has another shape.
    """
    own = {
        f"{name}.{factor}": (adapter, getattr(adapter, factor), dim)
        for name, adapter in named_adapters(model_chunks)
        for factor, dim in (("lora_A", -1), ("lora_B", -2))
    }
    stages: Any = parallel_state.get_pipeline_model_parallel_group()
    whole = union(set(own), stages)
    missing, unknown = sorted(whole - set(tensors)), sorted(set(tensors) - whole)
    if missing and not allow_missing:
        raise ValueError(f"adapter tensors are missing: {_first(missing)}")
    if unknown:
        raise ValueError(
            f"the model has no adapter for {_first(unknown)}: add their modules to "
            "--lora-targets, or leave the tensors out"
        )
    writes = [
        (param, _reshard(adapter, param, tensors[key], dim, key))
        for key, (adapter, param, dim) in own.items()
        if key in tensors
    ]
    with torch.no_grad():
        for param, value in writes:
            param.copy_(value)


def _first(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))


def _unshard(adapter: LoRAAdapter, param: Tensor, dim: int) -> Tensor:
    group = adapter.a_group if dim == -1 else adapter.b_group
    full = start_gather(param.detach(), dim, group).wait()
    has_experts = adapter.a_experts if dim == -1 else adapter.b_experts
    if has_experts:
        full = start_gather(full, -full.dim(), adapter.expert_group).wait()
    if dim == -2 and adapter.spec.gated:
        full = full.flatten(-3, -2)
    if dim == -2 and adapter.spec.parts:
        full = in_whole_order(full, adapter.spec.parts, group_size(group))
    return full.cpu()


def _reshard(adapter: LoRAAdapter, param: Tensor, full: Tensor, dim: int, key: str) -> Tensor:
    shape, flat = _whole_shape(adapter, dim), _flat_shape(adapter, dim)
    has_experts = adapter.a_experts if dim == -1 else adapter.b_experts
    if dim == -2 and adapter.spec.is_unembedding:
        full = _fit_vocabulary(full, flat[-2])
    if list(full.shape) != flat:
        raise ValueError(f"{key} has shape {list(full.shape)}, but this model needs {flat}")
    value = full.reshape(shape)
    if dim == -2 and adapter.spec.parts:
        value = in_rank_order(value, adapter.spec.parts, group_size(adapter.b_group))
    if has_experts:
        value = own_shard(value, -value.dim(), adapter.expert_group)
    group = adapter.a_group if dim == -1 else adapter.b_group
    return own_shard(value, dim, group).to(param)


def _whole_shape(adapter: LoRAAdapter, dim: int) -> list[int]:
    """Return the shape of lora_A (dim -1) or lora_B (-2) over all ranks, gate and up apart."""
    shape = list(adapter.a_shape() if dim == -1 else adapter.b_shape())
    if adapter.a_experts if dim == -1 else adapter.b_experts:
        shape[0] *= group_size(adapter.expert_group)
    return shape


def _flat_shape(adapter: LoRAAdapter, dim: int) -> list[int]:
    shape = _whole_shape(adapter, dim)
    if dim == -2 and adapter.spec.gated:
        return [*shape[:-3], shape[-3] * shape[-2], shape[-1]]
    return shape


def _fit_vocabulary(lora_B: Tensor, rows: int) -> Tensor:
    """Trim or fill the rows of padding tokens, whose number follows the tensor-parallel size."""
    missing = rows - lora_B.shape[0]
    if missing <= 0:
        return lora_B[:rows]
    return torch.cat([lora_B, lora_B.new_zeros(missing, lora_B.shape[1])])
