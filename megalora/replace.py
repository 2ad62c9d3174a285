"""Replace functions of Megatron's modules, once."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace_once(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Let wrapper(original, *its arguments) answer for a module's function.

    A second call for the same function does nothing.
    """
    original = getattr(module, name)
    if getattr(original, "is_megalora", False):
        return
    replaced: Any = functools.wraps(original)(functools.partial(wrapper, original))
    replaced.is_megalora = True
    setattr(module, name, replaced)
