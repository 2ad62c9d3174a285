"""Do operations on shapes alone, or on some tensors with numbers among others with shapes."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

aten: Any = torch.ops.aten
META = torch.device("meta")


def answer(
    func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object], given: Sequence[Tensor]
) -> object:
    """Do an operation, also where some of its tensors have numbers and others only shapes.

    What a number decides, a plan decides by the tensor that has it (see `assumed`); a number that
    is asked of a shape is one.
    """
    devices = {tensor.device.type for tensor in given}
    if "meta" not in devices:
        return func(*args, **kwargs)
    if func.overloadpacket is aten._local_scalar_dense:
        return 1.0 if given[0].dtype.is_floating_point else 1
    if func.namespace == "c10d":
        # torch has no meta kernel for these alone, which return nothing but work that is done.
        coalesced = func._schema.name.endswith("coalesced_")
        return FakeWork().boxed() if coalesced else func(*args, **kwargs)
    if "cpu" in devices:
        if func.overloadpacket is aten.masked_select:
            return given[0].new_empty(int(given[1].expand(given[0].shape).sum()), device=META)
        args, kwargs = tree_map_only(Tensor, _without_numbers, (args, kwargs))
    return _shaped(func, args, kwargs)


def _shaped(func: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Do an operation on shapes; one that only makes tensors, like a call before, as that did.

    torch works shapes out in Python, for many operations, and a step repeats a few of them.
    """
    key = None if _aliases(func) else _key((func, args, *sorted(kwargs.items())))
    if key is None:
        return func(*args, **kwargs)
    if key not in _made:
        out = func(*args, **kwargs)
        alone = isinstance(out, Tensor) and out.device.type == "meta"
        # As `_unsafe_view` does, which does not say so.
        if alone and _shares(out, (args, *kwargs.values())):
            alone = False
        _made[key] = (out.shape, out.stride(), out.dtype) if alone else None
        return out
    like = _made[key]
    if like is None:
        return func(*args, **kwargs)
    shape, strides, dtype = like
    return torch.empty_strided(shape, strides, dtype=dtype, device=META)


def _shares(out: Tensor, given: Iterable[object]) -> bool:
    """Say whether a tensor has the storage of one that was given."""
    own = out.untyped_storage()._cdata
    return any(
        t.untyped_storage()._cdata == own for t in tree_leaves(given) if isinstance(t, Tensor)
    )


_made: dict[object, tuple[torch.Size, tuple[int, ...], torch.dtype] | None] = {}


@functools.cache
def _aliases(func: OpOverload) -> bool:
    """Say whether an operation returns, or writes into, what it is given."""
    schema = func._schema
    return any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))


def _key(value: object) -> object:
    """Return what decides the shape of an operation's result, hashable; None where that fails."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        keys = tuple(_key(part) for part in value)
        return None if any(key is None for key in keys) else keys
    # True is not 1 here.
    return type(value), value


def _without_numbers(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else torch.empty_like(tensor, device="meta")
