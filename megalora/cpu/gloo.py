"""What Megatron asks of NCCL and gloo does not have."""

import functools
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Send every process group to gloo and fill its gaps."""
    _use_gloo()
    _share_groups()
    _patch_isend()
    _patch_uneven()
    _patch_average()


def _replace(name: str, function: Any) -> None:
    """Replace a collective where users find it and where torch.distributed itself looks it up."""
    setattr(dist, name, function)
    setattr(dist.distributed_c10d, name, function)


def _use_gloo() -> None:
    init_process_group, new_group = dist.init_process_group, dist.new_group

    @functools.wraps(init_process_group)
    def init_gloo(backend: object = None, *args: Any, **kwargs: Any) -> None:
        for nccl_only in ("device_id", "pg_options"):
            kwargs.pop(nccl_only, None)
        init_process_group("gloo", *args, **kwargs)

    @functools.wraps(new_group)
    def new_gloo_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: object = None,
        pg_options: object = None,
        **kwargs: Any,
    ) -> Any:
        return new_group(ranks, timeout=timeout, backend="gloo", **kwargs)

    _replace("init_process_group", init_gloo)
    _replace("new_group", new_gloo_group)


def _share_groups() -> None:
    """Make one group for each set of ranks, which all who ask for these ranks get.

    Megatron asks for some eighteen groups, most of them of the same few sets of ranks, and forgets
    them without freeing them; a gloo group is three threads that never sleep for long. One is
    enough: a single thread of each rank issues the collectives, in an order that all members share.
    A group lives as long as the world: its members cannot tell the other ranks, which must agree on
    what `new_group` makes, that they have destroyed it.
    """
    new_group, destroy_process_group = dist.new_group, dist.destroy_process_group
    groups: dict[Any, Any] = {}

    @functools.wraps(new_group)
    def new_shared_group(
        ranks: Any = None,
        timeout: Any = None,
        backend: object = None,
        pg_options: object = None,
        use_local_synchronization: bool = False,
        **kwargs: Any,
    ) -> Any:
        # What ranks that are not members do differs with local synchronization.
        key = (None if ranks is None else tuple(ranks), timeout, use_local_synchronization)
        if key not in groups:
            kwargs["use_local_synchronization"] = use_local_synchronization
            groups[key] = new_group(ranks, timeout, backend, pg_options, **kwargs)
        return groups[key]

    @functools.wraps(destroy_process_group)
    def destroy_world(group: Any = None) -> None:
        if group is None or group is dist.group.WORLD:
            groups.clear()
            destroy_process_group(group)
        elif group not in groups.values():
            destroy_process_group(group)

    _replace("new_group", new_shared_group)
    _replace("destroy_process_group", destroy_world)


def _patch_isend() -> None:
    """Send a copy.

    gloo sends straight from the tensor's memory, and the pipeline schedules free an output as soon
    as isend returns (`deallocate_output_tensor`): without a copy messages arrive corrupted.
    """
    isend = dist.isend

    @functools.wraps(isend)
    def isend_copy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return isend(tensor.detach().clone(), *args, **kwargs)

    _replace("isend", isend_copy)


def _patch_uneven() -> None:
    """Allow shards of unequal length, which expert tensor parallelism with experts apart makes."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(all_gather)
    def all_gather_uneven(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        lengths = [shard.shape[0] if shard.dim() else 1 for shard in tensor_list]
        if len(set(lengths)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        _refuse_async("all_gather", async_op)
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in lengths]
        all_gather(gathered, padded, group=group)
        for shard, buffer, length in zip(tensor_list, gathered, lengths, strict=True):
            shard.copy_(buffer[:length])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        lengths = [shard.shape[0] for shard in input_list]
        if len(set(lengths)) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        _refuse_async("reduce_scatter", async_op)
        total = torch.cat(input_list)
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.split(lengths)[dist.get_rank(group)])
        return None

    _replace("all_gather", all_gather_uneven)
    _replace("reduce_scatter", reduce_scatter_uneven)


def _refuse_async(name: str, async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(f"asynchronous {name} of unequal shards on gloo")


def _patch_average() -> None:
    """Do ReduceOp.AVG as a sum of parts divided by the group's size."""
    all_reduce, reduce_scatter_tensor = dist.all_reduce, dist.reduce_scatter_tensor
    sum_op, avg_op = dist.ReduceOp.SUM, dist.ReduceOp.AVG

    @functools.wraps(all_reduce)
    def all_reduce_avg(
        tensor: torch.Tensor, op: Any = sum_op, group: Any = None, async_op: bool = False
    ) -> Any:
        if op == avg_op:
            tensor.div_(dist.get_world_size(group))
            op = sum_op
        return all_reduce(tensor, op=op, group=group, async_op=async_op)

    @functools.wraps(reduce_scatter_tensor)
    def reduce_scatter_tensor_avg(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = sum_op,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op == avg_op:
            input = input / dist.get_world_size(group)
            op = sum_op
        return reduce_scatter_tensor(output, input, op=op, group=group, async_op=async_op)

    _replace("all_reduce", all_reduce_avg)
    _replace("reduce_scatter_tensor", reduce_scatter_tensor_avg)
