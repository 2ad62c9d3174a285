"""What the compiled library was built for, read off its file without loading it."""

import contextlib
import json
import mmap
import re
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).parent / "_C.so"
HOW_TO_BUILD = (
    "install a wheel of megalora, or build it beside this torch by `pip install "
    "--no-build-isolation --no-deps --force-reinstall` of the source (`-e .` in a checkout), or "
    "use the plain torch ops with MEGALORA_OPS=reference"
)
# csrc/built.cpp has this text.
_MARK = b"megalora is built {"
_LONGEST = 1000


class Built(NamedTuple):
    """What csrc was compiled with.

    oldest_torch: the first one that it loads in, as in "2.11"; every later one does too.
    cuda: the toolkit's version as CUDA writes it, 13000 for 13.0; 0 without CUDA ops.
    architectures: of the CUDA ops, as in "sm_80,sm_90a".
    """

    oldest_torch: str
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


def misfit(library: Path, torch: str, cuda: str | None) -> str | None:
    """Return in a sentence why a library is not one for this torch; None where it may be.

    torch: the version that runs. cuda: that of its CUDA, as in "13.0"; None without. CUDA promises
    that a library runs with every release of the same first number.
    """
    built = read_built(library)
    if built is None:
        return None
    if _numbers(torch) < _numbers(built.oldest_torch):
        return f"it needs torch {built.oldest_torch} or newer, and this is torch {torch}"
    if built.cuda and built.cuda // 1000 != int((cuda or "0").partition(".")[0]):
        here = f"has CUDA {cuda}" if cuda else "is built without CUDA"
        return f"its CUDA ops are for CUDA {built.cuda // 1000}, and this torch {here}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
