"""Time variants of one computation in turns, so that whatever slows the machine slows all of them.

A round runs every variant once; what is compared are the medians of the ratios inside rounds. On
one CPU thread the clock is the CPU time of the process, which other processes do not lengthen.
"""

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PHASES = ("forward", "backward", "both")
_QUEUEING_CYCLES = 6_000_000  # 3 ms at 2 GHz


@dataclass(frozen=True)
class Variant:
    """A differentiable function of the tokens x that trains `parameters` and reads `frozen`."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor] = ()
    frozen: Sequence[Tensor] = ()


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
    for variant in variants:
        for _ in range(2):
            _timed_step(variant, x, dy)
    results: list[dict[str, dict[str, float]]] = []
    for index in range(rounds):
        order = variants if index % 2 == 0 else variants[::-1]
        results.append({variant.name: _timed_step(variant, x, dy) for variant in order})
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


def _timed_step(variant: Variant, x: Tensor, dy: Tensor) -> dict[str, float]:
    for leaf in (x, *variant.parameters):
        leaf.grad = None
    if x.device.type == "cuda":
        # The GPU waits while the host queues the work: what is timed is the GPU's, without gaps.
        torch.cuda._sleep(_QUEUEING_CYCLES)
    marks = [_mark(x.device)]
    y = variant.forward(x)
    marks.append(_mark(x.device))
    y.backward(dy)
    marks.append(_mark(x.device))
    forward, backward = _elapsed(marks)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(marks: list[Any]) -> list[float]:
    if isinstance(marks[0], float):
        return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


class BytesMoved(TorchDispatchMode):
    """Count the bytes that ops read and write at their boundaries; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def launches(variant: Variant, x: Tensor, dy: Tensor) -> int | None:
    """Return the number of GPU kernels of forward and backward, None on a CPU."""
    if x.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        variant.forward(x).backward(dy)
        torch.cuda.synchronize()
    return sum(1 for event in profile.events() or [] if event.device_type.name == "CUDA")


def measure(variants: Sequence[Variant], x: Tensor, dy: Tensor, rounds: int) -> list[dict]:
    """Return one row for each variant: times, overheads, saved bytes, bytes moved, launches."""
    timings = paired(variants, x, dy, rounds)
    return [
        {
            "variant": variant.name,
            **{f"{phase}_ms": timings[variant.name].milliseconds[phase] for phase in PHASES},
            **{f"{phase}_overhead": timings[variant.name].overhead[phase] for phase in PHASES},
            "saved_bytes": saved_bytes(variant, x),
            "bytes_moved": bytes_moved(variant, x, dy),
            "launches": launches(variant, x, dy),
        }
        for variant in variants
    ]


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


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def print_rows(title: str, rows: Sequence[dict]) -> None:
    """Print one table: milliseconds and overhead over the first row by phase."""
    print(f"\n{title}")
    print(
        f"{'variant':<20}"
        + "".join(f"{phase:>18}" for phase in PHASES)
        + f"{'saved MB':>10}{'moved MB':>10}"
    )
    for row in rows:
        cells = "".join(
            f"{row[f'{phase}_ms']:>9.2f}{100 * row[f'{phase}_overhead']:>+8.1f}%"
            for phase in PHASES
        )
        moved = f"{row['saved_bytes'] / 1e6:>10.2f}{row['bytes_moved'] / 1e6:>10.1f}"
        print(f"{row['variant']:<20}{cells}{moved}", flush=True)


def write_json(path: Path, content: dict) -> None:
    """Write results as JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)
