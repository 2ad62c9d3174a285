"""What a rank keeps from step to step: tensors of its model, its DDP buffers and its optimizer."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class Kind(StrEnum):
    """What a kept tensor is for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    BUFFERS = "buffers"


class Held(NamedTuple):
    """A tensor that is kept; parameter: the name of the one that it is of, empty for all others."""

    kind: Kind
    parameter: str
    tensor: Tensor


def held(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> Iterator[Held]:
    """Yield all that a rank keeps; tensors that share a storage come one by one.

    Of the optimizer what there is so far: its states are made by its first step. Numbers of no
    dimension, which count steps, are left out.
    """
    names = dict(parameter_names(model))
    for parameter, name in names.items():
        yield Held(Kind.WEIGHTS, name, parameter)
        for gradient in _gradients(parameter):
            yield Held(Kind.GRADIENTS, name, gradient)
    for buffer in (*dense_buffers(model), *expert_buffers(model)):
        if buffer.param_data is not None:
            yield Held(Kind.WEIGHTS, "", buffer.param_data)
        if buffer.grad_data is not None:
            yield Held(Kind.GRADIENTS, "", buffer.grad_data)
    yield from _optimizer(optimizer, names)
    for chunk in model:
        for _, tensor in chunk.named_buffers():
            yield Held(Kind.BUFFERS, "", tensor)


def storages(holdings: Sequence[Held]) -> dict[Kind, int]:
    """Return the bytes of each kind; what several share is counted once, for the first kind."""
    counted: set[int] = set()
    totals = dict.fromkeys(Kind, 0)
    for kind in Kind:
        for one in holdings:
            storage = one.tensor.untyped_storage()
            if one.kind is kind and storage._cdata not in counted:
                counted.add(storage._cdata)
                totals[kind] += storage.nbytes()
    return totals


def parameter_names(model: Sequence[torch.nn.Module]) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """Yield each parameter of model chunks with its name, which is one chunk's alone."""
    for number, chunk in enumerate(model):
        # Each counts its layers from 0.
        prefix = f"chunks.{number}." if len(model) > 1 else ""
        for name, parameter in chunk.named_parameters():
            yield parameter, prefix + name


def dense_buffers(model: Sequence[torch.nn.Module]) -> list[_ParamAndGradBuffer]:
    """Return the buffers of parameters that are not an expert's."""
    # As an attribute, DDP has its own under the name of torch's method.
    return [buffer for chunk in _wrapped(model) for buffer in cast(Any, chunk).buffers]


def expert_buffers(model: Sequence[torch.nn.Module]) -> list[_ParamAndGradBuffer]:
    """Return the buffers of experts' parameters."""
    return [buffer for chunk in _wrapped(model) for buffer in chunk.expert_parallel_buffers]


def shards(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield each parameter that this rank updates, with what its optimizer updates in its place.

    It is the parameter, an fp32 copy of it or, of the distributed optimizer, a part of either.
    """
    for one in _single(optimizer):
        for group, in_place in _groups(one):
            yield from zip(group, in_place, strict=True)


def _wrapped(model: Sequence[torch.nn.Module]) -> list[DistributedDataParallel]:
    return [chunk for chunk in model if isinstance(chunk, DistributedDataParallel)]


def _gradients(parameter: torch.nn.Parameter) -> Iterator[Tensor]:
    """Yield a parameter's gradients; it has a second one where sums are kept in fp32 apart."""
    for name in ("main_grad", "main_grad_copy_in_grad_buffer"):
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            yield gradient


def _optimizer(
    optimizer: MegatronOptimizer, names: dict[torch.nn.Parameter, str]
) -> Iterator[Held]:
    owner = {id(own): names.get(parameter, "") for parameter, own in shards(optimizer)}
    for one in _single(optimizer):
        for group in one.optimizer.param_groups:
            for own in group["params"]:
                name = owner.get(id(own), "")
                yield Held(Kind.OPTIMIZER, name, own)
                for state in one.optimizer.state.get(own, {}).values():
                    if isinstance(state, Tensor) and state.dim():
                        yield Held(Kind.OPTIMIZER, name, state)


def _single(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers of a chain that have parameters here."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def _groups(
    one: MegatronOptimizer,
) -> Iterator[tuple[Sequence[torch.nn.Parameter], Sequence[Tensor]]]:
    """Yield groups of parameters with what one of Megatron's three optimizers updates of them."""
    optimizer: Any = one
    if hasattr(optimizer, "shard_fp32_groups"):
        # Where the optimizer itself keeps what is fp32, it has the parameters' own shards.
        for models, mains, own in zip(
            optimizer.model_float16_groups,
            optimizer.shard_fp32_from_float16_groups,
            optimizer.shard_float16_groups,
            strict=True,
        ):
            yield models, [o if main is None else main for main, o in zip(mains, own, strict=True)]
        yield from zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True)
    elif hasattr(optimizer, "fp32_from_float16_groups"):
        yield from zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for group in optimizer.fp32_from_fp32_groups:
            yield group, group
    else:
        for group in optimizer.optimizer.param_groups:
            yield group["params"], group["params"]
