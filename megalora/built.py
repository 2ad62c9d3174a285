"""What the compiled library was built for, read off its file without loading it."""

import contextlib
import json
import mmap
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).parent / "_C.so"
# csrc/built.cpp has this text.
_MARK = b"megalora is built {"
_LONGEST = 1000


class Built(NamedTuple):
    """What csrc was compiled with.

    torch: its version, as in "2.13.0".
    cuda: the toolkit's version as CUDA writes it, 13000 for 13.0; 0 without CUDA ops.
    architectures: of the CUDA ops, as in "sm_80,sm_90a".
    """

    torch: str
    compiler: str
    cuda: int
    architectures: str


def read_built(library: Path) -> Built | None:
    """Return what a library was built for; None where its file does not say so."""
    with library.open("rb") as file, contextlib.suppress(ValueError, TypeError):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = text.find(_MARK)
            told = text[start + len(_MARK) - 1 : start + _LONGEST].partition(b"\0")[0]
        return Built(**json.loads(told))
    return None


def misfit(library: Path, torch: str) -> str | None:
    """Return in a sentence why a library is not one for this torch; None where it may be.

    torch: the version that runs. Releases with the same first two numbers load each other's.
    """
    built = read_built(library)
    if built is None or _minor(built.torch) == _minor(torch):
        return None
    return f"it was built for torch {built.torch}, and this is torch {torch}"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def how_to_build(torch: str) -> str:
    """Return what to do where the library cannot be used."""
    return (
        f"install a wheel of megalora for torch {'.'.join(_minor(torch))}, or build it beside this "
        "torch by `pip install --no-build-isolation --no-deps --force-reinstall` of the source "
        "(`-e .` in a checkout), or use the plain torch ops with MEGALORA_OPS=reference"
    )
