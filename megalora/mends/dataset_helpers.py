"""The start of a run from a wheel, which brings the compiled dataset helpers and no Makefile."""

import importlib.util
from pathlib import Path

from megatron.core.datasets import utils

from megalora.replace import Patch, instead


def patches() -> tuple[Patch, ...]:
    """Skip `make`, with which Megatron starts a run and ends one that has no Makefile.

    Where there is a Makefile (Megatron's source), or nothing compiled, Megatron's own way is left.
    """
    has_makefile = Path(utils.__file__).with_name("Makefile").exists()
    if has_makefile or importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return ()
    why = "the wheel has `helpers_cpp` compiled and no Makefile: `make` would end the run"
    return (Patch(utils, "compile_helpers", (), instead(_skip), why),)


def _skip() -> None:
    """Compile nothing."""
