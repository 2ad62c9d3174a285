"""The start of a run from a wheel, which brings the compiled dataset helpers and no Makefile."""

import importlib.util
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils


def install() -> None:
    """Skip `make`, with which Megatron starts a run and ends one that has no Makefile.

    Where there is a Makefile (Megatron's source), or nothing compiled, Megatron's own way is left.
    """
    has_makefile = Path(utils.__file__).with_name("Makefile").exists()
    if has_makefile or importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    patched: Any = utils
    patched.compile_helpers = lambda: None
