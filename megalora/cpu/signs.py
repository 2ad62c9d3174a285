"""Signs that a run without a CUDA device was meant for GPUs: it must end, not train on the CPU."""

import contextlib
import datetime
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError

# Of the driver, and of the device files that containers are given.
_DRIVER_FILES = ("proc/driver/nvidia", "dev/nvidiactl", "dev/nvidia[0-9]*")
# A launcher's numbers of processes, in all and on this node.
_SIZES = (
    ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
_NODES = ("GROUP_WORLD_SIZE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
_WAIT = datetime.timedelta(minutes=5)


def gpu_signs(environ: Mapping[str, str], root: Path = Path("/")) -> list[str]:
    """Return what on this node or in its environment tells of GPUs, in words.

    CUDA_VISIBLE_DEVICES that is set and empty, or -1, says that none is wanted.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    files = (path for pattern in _DRIVER_FILES for path in sorted(root.glob(pattern)))
    signs = [f"/{path.relative_to(root)} exists" for path in files]
    if visible is not None:
        signs.append(f"CUDA_VISIBLE_DEVICES is {visible!r}")
    for name in _NODES:
        if _number(environ, name) > 1:
            signs.append(f"{name} is {environ[name]}: the run has several nodes")
    for total, local in _SIZES:
        if 0 < _number(environ, local) < _number(environ, total):
            signs.append(
                f"{total} is {environ[total]} and {local} {environ[local]}: the run has several "
                "nodes"
            )
    return signs


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def refusal(signs: list[str], environ: Mapping[str, str]) -> str:
    """Return the message of a rank that ends because of these signs."""
    return (
        f"rank {environ.get('RANK', '0')} on node {socket.gethostname()} has no CUDA device "
        f"({why_no_device()}), but was meant for GPUs: {'; '.join(signs)}. Mend the node's driver, "
        "or leave the node out; for a run on the CPU give --cpu"
    )


def why_no_device() -> str:
    """Return in a line why torch has no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "torch.cuda.is_available() is False"


def tell_siblings(device: str, environ: Mapping[str, str]) -> Store | None:
    """Tell the other ranks of a torchrun on what this one runs; None where there are none to tell.

    device: "cuda" or "cpu".
    """
    alone = _number(environ, "WORLD_SIZE") < 2
    if alone or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    server = TCPStore(*address, is_master=False, timeout=_WAIT)
    store = PrefixStore(f"megalora/devices/{attempt}", server)
    store.set(environ["RANK"], device)
    return store


def sibling_signs(environ: Mapping[str, str]) -> list[str]:
    """Return which ranks of this torchrun have CUDA devices, once all have told.

    As where each rank has its own CUDA_VISIBLE_DEVICES, and this one's is empty.
    """
    store = tell_siblings("cpu", environ)
    if store is None:
        return []
    ranks = [str(rank) for rank in range(int(environ["WORLD_SIZE"]))]
    # A rank that never tells does not run megalora, or died and ends the run.
    with contextlib.suppress(DistStoreError):
        store.wait(ranks)
    told = [rank for rank in ranks if store.check([rank])]
    on_gpus = [rank for rank in told if store.get(rank) == b"cuda"]
    return [f"rank {', '.join(on_gpus)} of this run has a CUDA device"] if on_gpus else []
