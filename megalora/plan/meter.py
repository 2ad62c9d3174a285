"""What a step on meta tensors would hold, compute and send: every operation is seen and counted."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakIdKeyDictionary

from megalora.plan import products, shapes
from megalora.plan.shapes import META

# Ways of a pass; the forward pass that recomputation does once more is by itself.
FORWARD, BACKWARD, AGAIN = "forward", "backward", "recomputed"
# Collectives, as c10d calls them, between two ranks.
MESSAGES = ("send", "recv_")


class Call(NamedTuple):
    """One kind of collective: who asks for it (a module), in which phase of a step, among whom.

    kind: c10d's name, as `_allgather_base_`. way: of the pass. ranks: of the group; of a message
    between two, these. group: what Megatron calls it.
    """

    kind: str
    owner: str
    phase: str
    way: str
    ranks: tuple[int, ...]
    group: str


class Product(NamedTuple):
    """One kind of matrix product: who asks for it (a module), in which phase of a step, which op.

    way: of the pass. shapes: of the tensors that it is given.
    """

    op: str
    owner: str
    phase: str
    way: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


class Meter(TorchDispatchMode):
    """Count, while it is entered, what tensors on a device hold, and what is computed and sent.

    device: whose storages count; a plan's is meta, a real run's the CPU. After a step, `live` and
    `peak` are bytes; `calls` and `sent` say how often each collective came and how many bytes its
    larger side had; `products`, `flops` and `moved` the same of matrix products, `moved` being the
    bytes of what they are given, once, and of what they make.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.phase = ""
        self.live = self.peak = 0
        self.calls: Counter[Call] = Counter()
        self.sent: Counter[Call] = Counter()
        self.products: Counter[Product] = Counter()
        self.flops: Counter[Product] = Counter()
        self.moved: Counter[Product] = Counter()
        self._storages: Any = WeakIdKeyDictionary()
        self._kernels = 0
        self._groups: dict[int, tuple[tuple[int, ...], str]] = {}

    def restart(self) -> None:
        """Forget what was counted; what is held is still held."""
        for counter in (self.calls, self.sent, self.products, self.flops, self.moved):
            counter.clear()
        self.peak = self.live

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Give what happens in this context to a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def in_one_kernel(self) -> Iterator[None]:
        """Let what is made and dropped in this context stay in registers: it is no peak."""
        self._kernels += 1
        try:
            yield
        finally:
            self._kernels -= 1
            self._see_peak()

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew that was let go or filled again without an operation."""
        if storage in self._storages:
            size: list[int] = self._storages[storage]
            self.live += storage.nbytes() - size[0]
            size[0] = storage.nbytes()
            self._see_peak()

    def hold(self, tensors: Sequence[Tensor]) -> int:
        """Count storages that were there before; returns the bytes of those not counted yet."""
        before = self.live
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                self._hold(tensor)
        return self.live - before

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Do one operation, and count what it does."""
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if func.namespace == "c10d":
            self._count_call(func, args)
        out = shapes.answer(func, args, kwargs, given)
        made = _tensors((out,))
        flops = products.flops(func, args, kwargs, out, given)
        if flops is not None:
            self._count_product(func, given, made, flops)
        self.hold(made)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        size = [storage.nbytes()]
        self._storages[storage] = size
        self.live += size[0]
        self._see_peak()
        weakref.finalize(storage, self._free, size)

    def _see_peak(self) -> None:
        if not self._kernels:
            self.peak = max(self.peak, self.live)

    def _free(self, size: list[int]) -> None:
        self.live -= size[0]

    def _count_call(self, func: OpOverload, args: Sequence[object]) -> None:
        group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        if group is None:
            return
        kind, (owner, way) = func._schema.name.split("::")[1], _asked()
        ranks, name = self._group(group)
        if kind in MESSAGES:
            # It and the other's number in the group come before the tag.
            ranks = tuple(sorted((dist.get_rank(), ranks[cast(int, args[2])])))
        call = Call(kind, owner, self.phase, way, ranks, name)
        self.calls[call] += 1
        self.sent[call] += _bytes_of_call(args)

    def _group(self, group: torch.ScriptObject) -> tuple[tuple[int, ...], str]:
        own = dist.ProcessGroup.unbox(cast(Any, group))
        if id(own) not in self._groups:
            self._groups[id(own)] = tuple(dist.get_process_group_ranks(own)), own.group_desc
        return self._groups[id(own)]

    def _count_product(
        self, func: OpOverload, given: Sequence[Tensor], made: Sequence[Tensor], flops: int
    ) -> None:
        sizes = tuple(tuple(tensor.shape) for tensor in given)
        op, dtype = str(func.overloadpacket), given[0].dtype
        owner, way = _asked()
        product = Product(op, owner, self.phase, way, sizes, dtype)
        self.products[product] += 1
        self.flops[product] += flops
        # An op that makes nothing changes its first tensor: it is read, and written.
        self.moved[product] += sum(tensor.nbytes for tensor in (*given, *(made or given[:1])))


def meters() -> list[Meter]:
    """Return the meters that are entered now."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Meter)]


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors among an operation's arguments, or in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _bytes_of_call(args: Sequence[object]) -> int:
    """Return the bytes of a collective's larger side: all that it gathers, reduces or exchanges."""
    sides = [sum(tensor.nbytes for tensor in _tensors((arg,))) for arg in args]
    return max(sides, default=0)


_TRANSPARENT = (
    "torch.",
    "typing_extensions",
    "contextlib",
    "megalora.plan",
    "megalora.replace",
    "megalora.cpu",
)


# Functions that run a part of the backward pass, and those that compute a forward pass once more.
_BACKWARD = ("_engine_run_backward", "custom_backward")
_AGAIN = ("backward", "_recompute")
_CHECKPOINTS = "megatron.core.tensor_parallel.random"


def _asked() -> tuple[str, str]:
    """Return the module whose code asks for what torch is doing now, and the way of the pass."""
    frame: Any = sys._getframe(2)
    owner = ""
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if not owner and not module.startswith(_TRANSPARENT):
            owner = module
        if function in _BACKWARD:
            return owner, BACKWARD
        if function in _AGAIN and module == _CHECKPOINTS:
            return owner, AGAIN
        frame = frame.f_back
    return owner, FORWARD
