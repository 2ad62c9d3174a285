"""Run a program as on a GPU: CUDA devices and NCCL are faked, and nothing else of Megatron.

python -m tests.support.as_on_gpu SCRIPT.py <its flags>
python -m tests.support.as_on_gpu run SCRIPT.py <its flags>         by `megalora run`

What `megalora.cpu` brings for the CPU's sake alone, stand-ins for CUDA kernels, is left out.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from megalora import cpu
from megalora.__main__ import main


def show_a_gpu() -> None:
    """Fake the devices, for Megatron and for megalora's own questions after them."""
    # The compiled operators ask torch themselves, which has no GPU.
    assert importlib.util.find_spec("transformer_engine") is None, "its kernels need a GPU"
    cpu.install_devices()
    is_available, device_count = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available = lambda: _is_asked() or is_available()
    torch.cuda.device_count = lambda: 1 if _is_asked() else device_count()


def _is_asked() -> bool:
    caller = sys._getframe(2).f_globals["__name__"]
    return caller.startswith(("megatron.", "megalora."))


if __name__ == "__main__":
    show_a_gpu()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "run":
        sys.exit(main(sys.argv))
    # Not runpy: Megatron's checkpoint writers import this module again, and not the script.
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"))
