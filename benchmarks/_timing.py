"""Time variants of one computation in turns, so that whatever slows the machine slows all of them.

A round runs every variant once; what is compared are the medians of the ratios inside rounds. On
one CPU thread the clock is the CPU time of the process, which other processes do not lengthen.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _results import PHASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAX_LISTED = 64  # kernels of a variant in results: a loop over experts has thousands
_CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Variant:
    """A differentiable function of the tokens x that trains `parameters` and reads `frozen`."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()
    frozen: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes read and written by a large copy, operations of a large GEMM.

    Both by the second.
    """

    copied_bytes: float
    gemm_flops: float

    def milliseconds(self, num_bytes: float) -> float:
        """Return how long reading or writing so many bytes takes at best."""
        return 1e3 * num_bytes / self.copied_bytes


def floor_row(
    frozen: dict[str, Any], found: Ceilings, *, x_bytes: int, y_bytes: int
) -> dict[str, Any]:
    """Return a row like a variant's for what LoRA costs at least.

    Forward one read of x that no GEMM shares, backward one of dY and one of x, at the speed of a
    large copy. frozen: the row of the base. x_bytes, y_bytes: sizes of input and output.
    """
    forward, backward = found.milliseconds(x_bytes), found.milliseconds(x_bytes + y_bytes)
    least = {"forward": forward, "backward": backward, "both": forward + backward}
    return {
        "variant": "floor",
        **{f"{phase}_ms": frozen[f"{phase}_ms"] + ms for phase, ms in least.items()},
        **{f"{phase}_overhead": ms / frozen[f"{phase}_ms"] for phase, ms in least.items()},
        "saved_bytes": 0,
        "bytes_moved": 0,
    }


@dataclass(frozen=True)
class Timing:
    """Milliseconds (medians) by phase, and overheads over the baseline (medians of the rounds)."""

    milliseconds: dict[str, float]
    overhead: dict[str, float]


def that_run(variants: Sequence[Variant], x: Tensor, dy: Tensor) -> tuple[list[Variant], list[str]]:
    """Return the variants that run at this shape, and the errors of those that do not."""
    found, failed = [], []
    for variant in variants:
        try:
            variant.forward(x).backward(dy)
        except Exception as error:
            if variant.name in ("frozen", "eager", "megalora"):
                raise
            failed.append(f"{variant.name}: {str(error).splitlines()[0][:100]}")
            continue
        found.append(variant)
    return found, failed


def paired(variants: Sequence[Variant], x: Tensor, dy: Tensor, rounds: int) -> dict[str, Timing]:
    """Time forward and backward of all variants in turns; the first variant is the baseline."""
    queueing = {variant.name: _queueing_seconds(variant, x, dy) for variant in variants}
    results: list[dict[str, dict[str, float]]] = []
    for index in range(rounds):
        order = variants if index % 2 == 0 else variants[::-1]
        results.append({v.name: _timed_step(v, x, dy, queueing[v.name]) for v in order})
    base = variants[0].name
    return {
        variant.name: Timing(
            {phase: statistics.median(r[variant.name][phase] for r in results) for phase in PHASES},
            {
                phase: statistics.median(
                    r[variant.name][phase] / r[base][phase] - 1.0 for r in results
                )
                for phase in PHASES
            },
        )
        for variant in variants
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings of a device: a copy of many times its cache, a square GEMM."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    one = torch.randn(size, size, device=device, dtype=dtype)
    other = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.ones(2**30 if on_gpu else 2**25, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    gemm = _median_seconds(lambda: one @ other, device)
    return Ceilings(2 * source.numel() / copy, 2 * size**3 / gemm)


def _median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median of ten runs after three that warm up."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda._sleep(int(2e-4 * _CYCLES_PER_SECOND))
        marks = [mark(device)]
        function()
        marks.append(mark(device))
        seconds.append(elapsed(marks)[0] / 1e3)
    return statistics.median(seconds)


def _queueing_seconds(variant: Variant, x: Tensor, dy: Tensor) -> float:
    """Warm up; return how long the host takes to queue a step on a GPU, with a margin."""
    for _ in range(3):
        synchronize(x.device)
        start = time.perf_counter()
        _timed_step(variant, x, dy, 0.0)
        seconds = time.perf_counter() - start
    return 1.5 * seconds + 1e-4


def _timed_step(variant: Variant, x: Tensor, dy: Tensor, queueing: float) -> dict[str, float]:
    for leaf in (x, *variant.parameters):
        leaf.grad = None
    if x.device.type == "cuda":
        # The GPU waits while the host queues the work: what is timed is the GPU's, without gaps.
        torch.cuda._sleep(int(queueing * _CYCLES_PER_SECOND))
    marks = [mark(x.device)]
    y = variant.forward(x)
    marks.append(mark(x.device))
    y.backward(dy)
    marks.append(mark(x.device))
    forward, backward = elapsed(marks)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """Return a point in time: an event on a GPU, seconds on a CPU."""
    if device.type != "cuda":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(marks: list[Any]) -> list[float]:
    """Return the milliseconds between neighbouring points in time."""
    if isinstance(marks[0], float):
        return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


class BytesMoved(TorchDispatchMode):
    """Count the bytes that ops read and write at their boundaries; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = _tensors((args, kwargs)) + _tensors(result)
            self.count += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_moved(variant: Variant, x: Tensor, dy: Tensor) -> int:
    """Return the bytes moved by forward and backward, counted at the boundaries of the ops."""
    x.grad = None
    with BytesMoved() as counter:
        variant.forward(x).backward(dy)
    return counter.count


def saved_bytes(variant: Variant, x: Tensor) -> int:
    """Return the bytes that autograd keeps for backward beyond x and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *variant.parameters, *variant.frozen)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.forward(x)
    return sum(storages.values())


def kernels(variant: Variant, x: Tensor, dy: Tensor) -> list[tuple[str, float]]:
    """Return name and microseconds of every GPU kernel of forward and backward, in order."""
    for leaf in (x, *variant.parameters):
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        variant.forward(x).backward(dy)
        torch.cuda.synchronize()
    found = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    found.sort(key=lambda event: event.time_range.start)
    return [(event.name[:120], event.device_time) for event in found]


def measure(
    variants: Sequence[Variant], x: Tensor, dy: Tensor, rounds: int, *, profiled: bool = False
) -> list[dict[str, Any]]:
    """Return one row for each variant: times, overheads, saved bytes, bytes moved.

    profiled: with the kernels of a GPU too, which takes a second for each variant.
    """
    timings = paired(variants, x, dy, rounds)
    rows = []
    for variant in variants:
        row: dict[str, Any] = {
            "variant": variant.name,
            **{f"{phase}_ms": timings[variant.name].milliseconds[phase] for phase in PHASES},
            **{f"{phase}_overhead": timings[variant.name].overhead[phase] for phase in PHASES},
            "saved_bytes": saved_bytes(variant, x),
            "bytes_moved": bytes_moved(variant, x, dy),
        }
        if profiled and x.device.type == "cuda":
            found = kernels(variant, x, dy)
            row["launches"] = len(found)
            row["kernels"] = found if len(found) <= MAX_LISTED else []
        rows.append(row)
    return rows


def assert_agreement(variants: Sequence[Variant], x: Tensor) -> None:
    """Refuse to time variants that compute something else than the one named eager.

    The base alone and PEFT, whose weights are its own, are left out.
    """
    outputs = {
        variant.name: variant.forward(x).detach().float()
        for variant in variants
        if variant.name not in ("frozen", "PEFT layer")
    }
    expected = outputs["eager"]
    tolerance = 2e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
    for name, output in outputs.items():
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"{name} differs from eager by {error}"
