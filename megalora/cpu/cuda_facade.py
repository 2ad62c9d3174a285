"""A look-alike of torch.cuda, and "cuda" devices that mean the CPU.

Or, for a plan, that mean the meta device (`on_meta`): shapes and sizes without memory.
"""

import collections
import contextlib
import functools
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

# Dynamo reads torch.cuda.Stream and others when it is imported: let it see the real ones, so that
# torch.compile keeps working for user code.
import torch._dynamo
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
META = torch.device("meta")
# What "cuda" means now.
_device = CPU
_MEMORY = 16 << 30

# Every function that makes a tensor and takes `device`. Patching these few costs nothing elsewhere;
# a TorchFunctionMode would add Python code to every tensor operation of the run.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


class Stream:
    """A stream on which everything is finished as soon as it is called."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Do nothing: whatever the other stream had is done."""

    def wait_event(self, event: object) -> None:
        """Do nothing: the event has happened."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return the event, which has happened now."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Do nothing: all is done."""

    def query(self) -> bool:
        """Say that all is done."""
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0


class Event:
    """An event that has happened once recorded; it keeps the wall time for Megatron's timers."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.record()

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Do nothing: it has happened."""

    def synchronize(self) -> None:
        """Do nothing: all is done."""

    def query(self) -> bool:
        """Say that all is done."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3


def install() -> None:
    """Patch torch.cuda, the tensor factories and the Tensor methods that name a device."""
    _patch_cuda()
    _patch_rng()
    _redirect_devices()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let "cuda" mean the meta device in this context: tensors of a GPU have shapes, no numbers."""
    global _device
    before, _device = _device, META
    try:
        with mock.patch.object(torch.nn.Module, "cuda", _marked(torch.nn.Module.cuda)):
            yield
    finally:
        _device = before


def _marked(cuda: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Keep what is written on parameters, such as `sequence_parallel`.

    A module moves to a GPU by new data of its parameters, but to the meta device by new parameters.
    """

    def moved(module: torch.nn.Module, *args: object, **kwargs: object) -> torch.nn.Module:
        marks = {name: dict(vars(param)) for name, param in module.named_parameters()}
        cuda(module, *args, **kwargs)
        for name, param in module.named_parameters():
            vars(param).update(marks[name])
        return module

    return moved


@contextlib.contextmanager
def without_jit_fuser() -> Iterator[None]:
    """Let megatron.core be imported in this context while torch.compile does nothing.

    Megatron's jit_fuser is torch.compile. On a GPU it makes a Triton kernel; here it would start a
    C++ compiler for every small function that it decorates. User code keeps the real one.
    """
    with mock.patch.object(torch, "compile", _leave_as_it_is):
        yield


def _leave_as_it_is(model: object = None, **kwargs: object) -> object:
    return model if callable(model) else lambda function: function


def _called_by_megatron() -> bool:
    """Tell Megatron's questions from torch's own: only Megatron is told that there is a GPU.

    torch.compile, DataLoader and the like ask the same functions and would use the GPU.
    """
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("megatron.")


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = Stream()
    is_available, device_count = cuda.is_available, cuda.device_count
    # megatron.training refuses to start without CUDA and counts devices to place its ranks.
    cuda.is_available = lambda: _called_by_megatron() or is_available()
    cuda.device_count = lambda: (
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _called_by_megatron() else device_count()
    )
    # Index 0 and not the CPU device: Megatron also formats it as f"cuda:{current_device()}".
    cuda.current_device = lambda: 0
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.device = lambda device=None: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    for name in (
        *("set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect"),
        *("reset_peak_memory_stats", "reset_max_memory_allocated"),
    ):
        setattr(cuda, name, _nothing())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing())
    for name in (
        *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
        "device_memory_used",
    ):
        setattr(cuda, name, lambda device=None: 0)
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)
    cuda.mem_get_info = lambda device=None: (_MEMORY, _MEMORY)
    # Ampere: bf16 is allowed, FP8 and newer kernels are not.
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=_MEMORY, multi_processor_count=1
    )


def _nothing() -> Callable[..., None]:
    """Return a new function for a call that only makes sense on a GPU.

    New each time: Dynamo refuses one function under two names of torch.
    """

    def do_nothing(*args: object, **kwargs: object) -> None:
        pass

    return do_nothing


def _patch_rng() -> None:
    """Let Megatron's tracker of CUDA generator states keep the states of the CPU generator."""
    for module in (torch.cuda, torch.cuda.random):
        patched: Any = module
        patched.get_rng_state = lambda device="cuda": torch.get_rng_state()
        patched.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
        # torch.manual_seed would call this function again through manual_seed_all.
        patched.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
        patched.manual_seed_all = _nothing()


def _meant(device: object) -> object:
    """Turn "cuda", "cuda:0", torch.device("cuda") and device indices into what stands for them."""
    if isinstance(device, str):
        return _device if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return _device if device.type == "cuda" else device
    return _device if isinstance(device, int) and not isinstance(device, bool) else device


def _with_device[T](function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)
    def made(*args: object, **kwargs: object) -> T:
        if kwargs.get("device") is not None:
            kwargs["device"] = _meant(kwargs["device"])
        # Pinned memory needs a CUDA context.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return made


def _redirect_devices() -> None:
    # torch.device("meta") as a context knows the factories by identity, from a set that it caches:
    # filled after the patches, it would miss them, and transformers would load garbage buffers.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_device(getattr(torch, name)))
    tensor: Any = torch.Tensor
    for name in _TENSOR_FACTORIES:
        setattr(tensor, name, _with_device(getattr(tensor, name)))
    # A method and not a variable: Dynamo can trace `self._to`, but not the bare C function.
    tensor._to = tensor.to
    type_ = tensor.type

    def to(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args:
            args = (_meant(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _meant(kwargs["device"])
        return self._to(*args, **kwargs)  # type: ignore[attr-defined]

    def cuda_type(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        result = type_(self, *args, **kwargs)
        # Megatron's optimizers sort parameters by names such as "torch.cuda.FloatTensor".
        if isinstance(result, str) and _called_by_megatron():
            return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        return result

    tensor.to, tensor.type = to, cuda_type
    # The test keeps Dynamo, which traces this too, from `_to` where nothing has to move.
    tensor.cuda = lambda self, *args, **kwargs: self if _device is CPU else self._to(_device)
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = _nothing()
