"""Chats about the functions of Python's standard library, answered in JSON: data for an example.

What does textwrap.dedent(text) do?
{"module": "textwrap", "function": "dedent", "takes": ["text"], "does": "Remove any common ..."}

Made from the source of the Python that runs, which is read and never imported. Chats to train on
and held-out ones share no function's name and no docstring.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from megalora.data.corpus import Module, questions, read_modules

KEYS = ("module", "function", "takes", "does")
HELD_OUT_PERCENT = 4


class Function(NamedTuple):
    """A public function of a module: its arguments, and what its docstring says that it does."""

    module: str
    name: str
    takes: list[str]
    does: str

    def question(self) -> str:
        """Return what a user asks."""
        return f"What does {self.module}.{self.name}({', '.join(self.takes)}) do?"

    def answer(self) -> str:
        """Return the answer in the style to be learned: one object, its keys in one order."""
        values = (self.module, self.name, self.takes, self.does)
        return json.dumps(dict(zip(KEYS, values, strict=True)), ensure_ascii=False)

    def chat(self) -> dict[str, list[dict[str, str]]]:
        """Return question and answer as a row of a chat dataset."""
        roles = {"user": self.question(), "assistant": self.answer()}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def functions(root: Path | None = None) -> tuple[list[Function], list[Function]]:
    """Return the functions to train on and the held-out ones, each list in a shuffled order.

    The hash of the bare name decides both, so the same Python gives the same lists, and a function
    that several modules have under one name is on one side. root: the library's folder.
    """
    modules = list(read_modules(root or Path(sysconfig.get_paths()["stdlib"])))
    found = sorted(documented(modules), key=lambda function: (digest(function.name), function))
    train = [function for function in found if not is_held_out(function)]
    return train, [function for function in found if is_held_out(function)]


def documented(modules: Iterable[Module]) -> Iterator[Function]:
    """Yield every public function at the top of a module, each docstring once."""
    modules = list(modules)
    does = {q.name: q.answer for q in questions(modules) if not q.is_class}
    for module in modules:
        dotted = module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.parse(module.source).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            # Taken out: of two definitions of one name, the docstring is the first one's.
            if answer := does.pop(f"{dotted}.{node.name}", None):
                yield Function(dotted, node.name, arguments(node.args), answer)


def arguments(args: ast.arguments) -> list[str]:
    """Return the names of a signature, `*` before what takes all others."""
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    return names + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def is_held_out(function: Function) -> bool:
    """Say whether a function is kept out of the training, by its name without the module."""
    return digest(function.name) % 100 < HELD_OUT_PERCENT


def digest(name: str) -> int:
    """Return a number that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def write(path: Path, rows: Iterable[Function]) -> None:
    """Write one chat a line."""
    lines = [json.dumps(function.chat(), ensure_ascii=False) + "\n" for function in rows]
    path.write_text("".join(lines), encoding="utf-8")


def in_style(answer: str, function: Function) -> bool:
    """Say whether an answer is one JSON object that names this function and its arguments.

    What the function does may be said in any words: no model can know a docstring by heart.
    """
    try:
        said = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(said, dict) or tuple(said) != KEYS or not isinstance(said["does"], str):
        return False
    return (said["module"], said["function"], said["takes"]) == function[:3]
