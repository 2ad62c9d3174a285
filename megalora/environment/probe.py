"""What only torch can say: `python -m megalora.environment.probe` prints a line of JSON for each.

In a process of its own, so that one that crashes or hangs here takes no report with it.
"""

import json
from collections.abc import Callable

import torch
from torch.cuda import nccl

from megalora.cpu.signs import why_no_device
from megalora.ops import Ops, reference
from megalora.ops.fused import load
from megalora.printable import printable


def _torch() -> dict[str, object]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": cudnn,
        "NCCL": ".".join(map(str, nccl.version())) if has_nccl else None,
        "threads": torch.get_num_threads(),
    }


def _devices() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"CUDA devices": [], "why none": why_no_device()}
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return {
        "CUDA devices": [
            f"{one.name}, sm_{one.major}{one.minor}, {one.total_memory / 2**30:.0f} GiB"
            for one in found
        ]
    }


def _ops() -> dict[str, object]:
    fused = load()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = [key for key in ("CPU", "CUDA") if has_kernel("megalora::shrink", key)]
    devices = [key for key in keys if key == "CPU" or torch.cuda.is_available()]
    return {"ops for": keys, "tried on": [device for device in devices if _right(fused, device)]}


def _right(fused: Ops, device: str) -> bool:
    """Say whether an op gives what its reference in torch does; raise where it gives another."""
    x = torch.arange(32.0, device=device.lower()).view(4, 8)
    lora_A = torch.arange(16.0, device=device.lower()).view(2, 8)
    found, expected = fused.shrink(x, lora_A), reference.shrink(x, lora_A)
    if not torch.allclose(found, expected):
        raise ValueError(f"shrink on {device} gives {found.tolist()}, not {expected.tolist()}")
    return True


STEPS: dict[str, Callable[[], dict[str, object]]] = {
    "torch": _torch,
    "devices": _devices,
    "ops": _ops,
}


def main() -> None:
    """Print what each step finds, or the error that ends it."""
    for name, step in STEPS.items():
        try:
            found = step()
        except Exception as error:  # the next steps may find more
            found = {"problem": printable(f"{type(error).__name__}: {error}")}
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
