"""What the system says of itself: Python, compilers, driver, and the variables that matter."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalora.printable import printable

# Of no other may the value be shown: it may be a password.
SWITCHES = ("MEGALORA_", "NVTE_", "CUDA_", "NCCL_")
_WAIT_S = 20.0


def describe_machine(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """Return Python, system, compilers and driver, each as far as it can be told."""
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return {
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "compiler": _first_line([environ.get("CXX") or "c++", "--version"]),
        "nvcc": _release([_nvcc(environ), "--version"]),
        "driver": driver or _driver_file(),
    }


def switches(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that change what megalora, TransformerEngine, CUDA or NCCL do."""
    names = sorted(name for name in environ if name.startswith(SWITCHES))
    return {name: printable(environ[name]) for name in names}


def _nvcc(environ: Mapping[str, str]) -> str:
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    return f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


def _release(command: Sequence[str]) -> str | None:
    found = re.search(r"release [\d.]+", _output(command))
    return f"{found[0]}, {command[0]}" if found else None


def _first_line(command: Sequence[str]) -> str | None:
    lines = _output(command).splitlines()
    return printable(lines[0]) if lines else None


def _output(command: Sequence[str]) -> str:
    """Return what a command prints; nothing where it is not there, fails or hangs."""
    options = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        finished = subprocess.run(command, timeout=_WAIT_S, **options)
    except (OSError, subprocess.SubprocessError):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""


def _driver_file() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    try:
        return printable(file.read_text(errors="replace").splitlines()[0])
    except (OSError, IndexError):
        return None
