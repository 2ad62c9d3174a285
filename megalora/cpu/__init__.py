"""Run the real megatron-core and megatron.training on CPU and gloo, every parallel layout included.

Nothing happens on import. `install` replaces what Megatron hard-codes about CUDA and NCCL, for this
process, before Megatron is imported; a run on GPUs never calls it.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence

import torch

from megalora import mends, replace
from megalora.cpu import cuda_facade, gloo, signs, wgrad

_INSTALLED = "_megalora_cpu_installed"


def wanted(argv: Sequence[str]) -> bool:
    """Say whether a run with these arguments belongs on the CPU: `--cpu`, or no CUDA device."""
    return "--cpu" in argv or not torch.cuda.is_available()


def installed() -> bool:
    """Say whether `install` has run in this process."""
    return hasattr(torch, _INSTALLED)


def install(
    collectives: Iterable[replace.Patch] = gloo.PATCHES, *, has_kernels: bool = False
) -> None:
    """Make Megatron run on CPU tensors and gloo in this process; a second call does nothing.

    collectives: what stands in the place of NCCL. has_kernels: TransformerEngine's layers run here,
    as a plan's do, which need no numbers.
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
    wgrad.install()
    install_devices(collectives)
    # It imports megatron, which must see the facade.
    from megalora.cpu import kernels

    if not has_kernels:
        replace.install(kernels.PATCHES)
    mends.install()


def install_devices(collectives: Iterable[replace.Patch] = gloo.PATCHES) -> None:
    """Put the CPU in place of CUDA devices and gloo in place of NCCL, and mend nothing else."""
    # Megatron asserts or warns on this CUDA launch order setting under tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda_facade.install()
    replace.install(collectives)
    with cuda_facade.without_jit_fuser():
        from megalora.cpu import megatron_devices
    replace.install(megatron_devices.PATCHES)
    megatron_devices.quiet_tracker()


def install_if_wanted(argv: Sequence[str]) -> bool:
    """Install where `wanted(argv)`, saying so on global rank 0 if it was not asked for.

    Raises ValueError on a rank that was meant for a GPU and has none, unless --cpu is given.
    """
    if installed():
        return True
    asked, is_script = "--cpu" in argv, not is_imported_again()
    if not wanted(argv):
        if is_script:
            signs.tell_siblings("cuda", os.environ)
        return False
    if not asked and is_script:
        found = signs.gpu_signs(os.environ) or signs.sibling_signs(os.environ)
        if found:
            raise ValueError(signs.refusal(found, os.environ))
        if os.environ.get("RANK", "0") == "0":
            print("megalora: no CUDA device found, Megatron runs on the CPU over gloo", flush=True)
    # Its layers need a GPU: where it is installed, this run is as where it is not.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    install()
    return True


def is_imported_again() -> bool:
    """Say whether a process that a run started imports the script, as writers of checkpoints do.

    It has the run's environment, but not always its flags.
    """
    return getattr(multiprocessing.current_process(), "_inheriting", False)
