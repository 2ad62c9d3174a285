"""Run the real megatron-core and megatron.training on CPU and gloo, every parallel layout included.

Nothing happens on import. `install` replaces what Megatron hard-codes about CUDA and NCCL, for this
process, before Megatron is imported; a run on GPUs never calls it.
"""

import multiprocessing
import os
import sys
from collections.abc import Sequence

import torch

from megalora.cpu import cuda_facade, gloo

_INSTALLED = "_megalora_cpu_installed"


def wanted(argv: Sequence[str]) -> bool:
    """Say whether a run with these arguments belongs on the CPU: `--cpu`, or no CUDA device."""
    return "--cpu" in argv or not torch.cuda.is_available()


def installed() -> bool:
    """Say whether `install` has run in this process."""
    return hasattr(torch, _INSTALLED)


def install() -> None:
    """Make Megatron run on CPU tensors and gloo in this process; a second call does nothing.

    Raises:
        RuntimeError: megatron.core was imported before, with its JIT fuser and CUDA names bound.
    """
    if installed():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core is already imported and has bound its CUDA functions: call "
            "megalora.cpu.install() before the first import of megatron"
        )
    setattr(torch, _INSTALLED, True)
    install_devices()
    # They import megatron, which must see the facade.
    from megalora import mends
    from megalora.cpu import kernels

    kernels.install()
    mends.install()


def install_devices() -> None:
    """Put the CPU in place of CUDA devices and gloo in place of NCCL, and mend nothing else."""
    # Megatron asserts or warns on this CUDA launch order setting under tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda_facade.install()
    gloo.install()
    from megalora.cpu import megatron_devices

    megatron_devices.install()


def install_if_wanted(argv: Sequence[str]) -> bool:
    """Install where `wanted(argv)`, saying so on global rank 0 if it was not asked for."""
    if not wanted(argv):
        return False
    # Checkpoint writers are spawned with the same environment and import the script again.
    spawned = multiprocessing.parent_process() is not None
    if "--cpu" not in argv and os.environ.get("RANK", "0") == "0" and not spawned:
        print("megalora: no CUDA device found, Megatron runs on the CPU over gloo", flush=True)
    install()
    return True
