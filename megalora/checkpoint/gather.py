"""Whole adapters of a running model: gathered on one rank, loaded on all, and their shapes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.adapter import named_adapters
from megalora.adapters.factors import Sharding
from megalora.adapters.finite import all_finite, refuse

# Of whole tensors, that travel together: far more than a collective takes to start.
BUCKET_BYTES = 64 * 2**20
_LAYER = re.compile(r"(.+?\.layers\.\d+)\.")

type _Entry = tuple[str, torch.nn.Parameter, Sharding]


def gather_adapters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Return all adapter tensors of the model, unsharded, on rank 0 (an empty dict elsewhere).

    Keys are global names such as `decoder.layers.3.mlp.linear_fc1_lora.lora_A`; output rows are in
    the order of the whole, as gate before up or z, x, B, C and dt; experts come first, [E, ...]. On
    the CPU. All ranks must call it.
    """
    return {key: t for piece in gather_layers(model_chunks) for key, t in piece.items()}


def gather_layers(
    model_chunks: Sequence[torch.nn.Module], *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Yield what `gather_adapters` returns in pieces of whole layers; empty but on rank 0.

    All ranks must go through it to its end. A piece is a layer or more of one pipeline stage, up to
    bucket_bytes. All ranks of its stage get it by one all-gather for each group that shards it, two
    for experts, and precision; rank 0 by one message for each precision, from the first rank of
    the stage. So a rank holds its shards of a piece, what it gathers and, where rows or experts are
    put in order, their copy: three times bucket_bytes, or a layer's bytes where it has more.
    """
    buckets = _buckets(list(_factors(model_chunks)), bucket_bytes)
    stages = _pipeline()
    own, ranks = dist.get_rank(), dist.get_process_group_ranks(stages)
    # Of all pipelines, the one that rank 0 is the first stage of.
    sizes: list[list[dict[str, tuple[torch.Size, torch.dtype]]]] = []
    if 0 in ranks and len(ranks) > 1:
        sizes = [[] for _ in ranks]
        own_sizes = [{key: (s.whole_shape(), p.dtype) for key, p, s in b} for b in buckets]
        dist.gather_object(own_sizes, sizes if own == 0 else None, dst=0, group=stages)
    for bucket in buckets:
        whole = _gather(bucket)
        if own and 0 in ranks:
            for flat in _flat(whole.values()).values():
                dist.send(flat, 0, group=stages)
        yield {key: tensor.cpu() for key, tensor in whole.items()} if own == 0 else {}
    if own == 0:
        for stage, of_stage in zip(ranks[1:], sizes[1:], strict=True):
            yield from (_receive(piece, stage, stages, _device(model_chunks)) for piece in of_stage)


def _buckets(entries: Sequence[_Entry], bucket_bytes: int) -> list[list[_Entry]]:
    """Put factors together, whole layers each, in their order."""
    layers: dict[str, list[_Entry]] = {}
    for entry in entries:
        found = _LAYER.match(entry[0])
        layers.setdefault(found[1] if found else "", []).append(entry)
    buckets: list[list[_Entry]] = []
    left = 0
    for layer in layers.values():
        size = sum(torch.Size(s.whole_shape()).numel() * p.itemsize for _, p, s in layer)
        if size > left:
            buckets.append([])
            left = bucket_bytes
        buckets[-1] += layer
        left -= size
    return buckets


def _gather(bucket: Sequence[_Entry]) -> dict[str, Tensor]:
    """Return the whole tensors of factors, on all ranks of their groups."""
    own = {key: (param.detach(), sharding.group) for key, param, sharding in bucket}
    shards = _all_gather(own)
    whole = {key: sharding.join(shards[key]) for key, _, sharding in bucket}
    of_experts = {k: (whole[k], s.expert_group) for k, _, s in bucket if s.num_experts}
    experts = _all_gather(of_experts)
    return whole | {key: torch.cat(found) for key, found in experts.items() if len(found) > 1}


def _all_gather(
    own: Mapping[str, tuple[Tensor, ProcessGroup | None]],
) -> dict[str, list[Tensor]]:
    """Return what each rank of a tensor's group has of it, by one collective for each group."""
    found = {key: [tensor] for key, (tensor, _) in own.items()}
    sharded: dict[ProcessGroup, list[str]] = {}
    for key, (_, group) in own.items():
        if group is not None and group.size() > 1:
            sharded.setdefault(group, []).append(key)
    for group, keys in sharded.items():
        shards: list[list[Tensor]] = [[] for _ in keys]
        for flat in _flat(own[key][0] for key in keys).values():
            ranks = flat.new_empty(group.size() * flat.numel())
            dist.all_gather_into_tensor(ranks, flat, group=group)
            of_dtype = [(n, own[k][0]) for n, k in enumerate(keys) if own[k][0].dtype == flat.dtype]
            for one in ranks.view(group.size(), -1):
                parts = one.split([tensor.numel() for _, tensor in of_dtype])
                for (n, tensor), part in zip(of_dtype, parts, strict=True):
                    shards[n].append(part.view(tensor.shape))
        found |= dict(zip(keys, shards, strict=True))
    return found


def _flat(tensors: Iterable[Tensor]) -> dict[torch.dtype, Tensor]:
    """Return the values of tensors one after the other, by precision."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return {dtype: torch.cat(of_dtype) for dtype, of_dtype in parts.items()}


def _receive(
    sizes: Mapping[str, tuple[torch.Size, torch.dtype]],
    sender: int,
    group: ProcessGroup,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the tensors that a rank sends as `_flat` puts them together, on the CPU."""
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(dtype for _, dtype in sizes.values()):
        of_dtype = {key: torch.Size(shape) for key, (shape, d) in sizes.items() if d == dtype}
        counts = [shape.numel() for shape in of_dtype.values()]
        flat = torch.empty(sum(counts), dtype=dtype, device=device)
        dist.recv(flat, sender, group=group)
        parts = flat.cpu().split(counts)
        for (key, shape), part in zip(of_dtype.items(), parts, strict=True):
            found[key] = part.view(shape)
    return found


def _device(model_chunks: Sequence[torch.nn.Module]) -> torch.device:
    return next(param.device for chunk in model_chunks for param in chunk.parameters())


def whole_shapes(model_chunks: Sequence[torch.nn.Module]) -> dict[str, list[int]]:
    """Return the names and shapes of what `gather_adapters` returns, on every rank.

    All ranks must call it.
    """
    return {name: shape for name, (shape, _) in whole_sizes(model_chunks).items()}


def whole_sizes(
    model_chunks: Sequence[torch.nn.Module],
) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return the names, shapes and precisions of what `gather_adapters` returns, on every rank.

    All ranks must call it.
    """
    own = {key: (list(s.whole_shape()), p.dtype) for key, p, s in _factors(model_chunks)}
    # What is whole is the same on all ranks of a stage.
    stages = _pipeline()
    of_stages: list[dict[str, tuple[list[int], torch.dtype]]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(of_stages, own, group=stages)
    return {name: size for stage in of_stages for name, size in stage.items()}


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
    whole = set(whole_sizes(model_chunks))
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


def _factors(model_chunks: Sequence[torch.nn.Module]) -> Iterator[_Entry]:
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
