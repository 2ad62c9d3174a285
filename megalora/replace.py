"""Replace what somebody else's module or class has: guarded, and once.

What is replaced stands in tables of `Patch`, beside what replaces it. docs/patches.md lists all.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

# Versions of megatron-core that have what the tables expect.
KNOWN = ("0.19", "0.20")

# A function, a class or a constant, of whatever type: a table has rows of many.
Member = object
Wrap = Callable[..., Member]


class UnknownMegatronError(RuntimeError):
    """Megatron is not as the tables expect."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One thing that is replaced: the member `name` of `owner`, by wrap(what was there).

    needs: parameters that the function there must have; None where it is no function. why: for
    docs/patches.md and its test.
    """

    owner: ModuleType | type
    name: str
    needs: Sequence[str] | None
    wrap: Wrap
    why: str

    @property
    def place(self) -> str:
        """Name what is replaced, as `megatron.training.training.save_checkpoint`."""
        return place(self.owner, self.name)


# By place: the names of the functions that have replaced it. A process has one Megatron.
_replaced: dict[str, list[str]] = {}


def install(patches: Iterable[Patch]) -> None:
    """Replace all that a table lists; what is replaced already is left as it is."""
    for patch in patches:
        replace(patch.owner, patch.name, patch.needs, patch.wrap)


def replace(owner: ModuleType | type, name: str, needs: Sequence[str] | None, wrap: Wrap) -> None:
    """Put wrap(original) in the place of a module's or class's member; once for each `wrap`.

    A static method or class method stays one; its `wrap` is given the function. Raises RuntimeError
    where the owner has no such member, or one without the parameters in `needs`.
    """
    done = _replaced.setdefault(place(owner, name), [])
    by = f"{wrap.__module__}.{wrap.__qualname__}"
    if by in done:
        return
    expect(owner, name, needs)
    member: Any = inspect.getattr_static(owner, name)
    if isinstance(member, staticmethod | classmethod):
        kind: Any = type(member)
        setattr(owner, name, kind(wrap(member.__func__)))
    else:
        setattr(owner, name, wrap(member))
    done.append(by)


def expect(owner: ModuleType | type, name: str, needs: Sequence[str] | None) -> None:
    """Raise RuntimeError where an owner has no such member, or not one with these parameters."""
    member = getattr(owner, name, None)
    if needs is None and hasattr(owner, name):
        return
    if callable(member) and set(needs or ()) <= _parameters(member):
        return
    wanted = f" (expected: a function of {', '.join(needs)})" if needs else ""
    raise UnknownMegatronError(
        f"{place(owner, name)} is {'not what megalora expects' if member else 'missing'}{wanted}: "
        f"megalora knows megatron-core {' and '.join(KNOWN)}, this is {_version()} with torch "
        f"{torch.__version__}: install one of these"
    )


def places() -> set[str]:
    """Return the names of all that is replaced in this process."""
    return {name for name, done in _replaced.items() if done}


def place(owner: ModuleType | type, name: str) -> str:
    """Name a member of a module or class by where it is."""
    if isinstance(owner, ModuleType):
        return f"{owner.__name__}.{name}"
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def around[**P, R](wrapper: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return the `wrap` that lets wrapper(original, *its arguments) answer for a function."""

    @functools.wraps(wrapper)
    def wrap(original: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(original)
        def replaced(*args: P.args, **kwargs: P.kwargs) -> R:
            return wrapper(original, *args, **kwargs)

        return replaced

    return wrap


def instead(value: Member) -> Wrap:
    """Return the `wrap` that puts a value there, whatever was there."""

    def wrap(original: Member) -> Member:
        return value

    return wrap


def _parameters(member: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(member).parameters)
    except ValueError:
        # A function in C that does not tell.
        return set()


def _version() -> str:
    return getattr(sys.modules.get("megatron.core"), "__version__", "not imported")
