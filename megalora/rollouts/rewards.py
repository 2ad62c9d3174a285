"""Rewards of answers: those that a name stands for, and functions of the user's own."""

import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import ModuleType

from megalora.data.prompts import Prompt

type Function = Callable[..., object]

# With thousands in groups of three, an exponent, and a minus that subtracts nothing.
_NUMBER = re.compile(
    r"(?<![0-9])-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
)


def exact(completion: str, answer: object) -> float:
    """Return 1 where the completion is the answer, or one of a list of answers."""
    return float(completion.strip() in [text.strip() for text in _texts(answer)])


def contains(completion: str, answer: object) -> float:
    """Return 1 where the answer, or one of a list of answers, stands in the completion."""
    return float(any(text in completion for text in _texts(answer)))


def number(completion: str, answer: object) -> float:
    """Return 1 where the completion's last number equals the last one of the answer.

    So that an answer may end with it, as those of GSM8K do. 1,000.0 is 1000; a fraction is two
    numbers. Raises ValueError for an answer without a number.
    """
    wanted = None
    if not isinstance(answer, list):
        wanted = _last_number(*_texts(answer))
    if wanted is None:
        raise ValueError("the answer has no number")
    return float(_last_number(completion) == wanted)


BUILT_IN: dict[str, Function] = {"exact": exact, "contains": contains, "number": number}


@dataclass(frozen=True)
class Reward:
    """A reward function by its name: `exact`, `module:function` or `FILE.py:function`.

    takes_row: it is called with completion, answer and row; else without the row.
    """

    name: str
    function: Function
    takes_row: bool

    def __call__(self, completion: str, prompt: Prompt) -> float:
        """Return the reward of a completion.

        Raises ValueError, with the function and the row, where the function raises or returns
        anything but a finite number.
        """
        given = (completion, prompt.answer, *((prompt.row,) if self.takes_row else ()))
        try:
            value = self.function(*given)
        except Exception as error:
            raise ValueError(
                f"reward {self.name} fails for {prompt.place} "
                f"({type(error).__name__}: {error}){_where(error)}: mend the function or the row"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"reward {self.name} returns {value!r:.60} ({type(value).__name__}) for "
                f"{prompt.place}: return a finite float"
            )
        return float(value)

    def of_all(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[float]:
        """Return the reward of each completion."""
        return [self(*pair) for pair in zip(completions, prompts, strict=True)]


def load_reward(name: str) -> Reward:
    """Return the reward of a name; this runs the user's own module.

    Raises ValueError where there is no such function, or none of two or three arguments.
    """
    function = BUILT_IN.get(name) or _own(name)
    for arguments in (("", None, {}), ("", None)):
        try:
            inspect.signature(function).bind(*arguments)
        except (TypeError, ValueError):
            continue
        return Reward(name, function, len(arguments) == 3)
    raise ValueError(
        f"reward {name} cannot be called with completion and answer, or with the row behind them: "
        "write def reward(completion, answer, row)"
    )


def _own(name: str) -> Function:
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name:
        raise ValueError(
            f"reward {name!r} is no function: give {', '.join(BUILT_IN)}, module:function or "
            "FILE.py:function"
        )
    try:
        module = _module(module_name)
    except Exception as error:
        raise ValueError(
            f"reward {name}: {module_name} cannot be imported ({type(error).__name__}: {error})"
            f"{_where(error)}: mend it, or give the path of its file"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(f"reward {name}: {module_name} has no such function, but {there}")
    return function


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"reward_{Path(name).stem}", name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Classes of the module look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _where(error: BaseException) -> str:
    """Return the file and line that raised, so that the user need not search."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else f" in {last.tb_frame.f_code.co_filename} line {last.tb_lineno}"


def _texts(answer: object) -> list[str]:
    """Return the texts of an answer: of a list each, of what is no text its JSON."""
    each = answer if isinstance(answer, list) else [answer]
    return [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in each]


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
