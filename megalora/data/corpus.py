"""Real text that every machine has: the source and the documentation of Python's standard library.

Two corpora, read with `ast` and never imported, in an order and a split that depend on nothing but
the files: `stdlib-text` (rows with `text`, for pretraining) and `stdlib-docstrings` (rows with
`prompt` and `completion`: what does a function do? what its docstring says). The answers held out
from the second are cut out of the first, so that no held-out answer is ever trained on.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "validation")

# Test suites, an editor, a grammar converter that 3.13 dropped, and what is not the library's own.
_SKIPPED_DIRECTORIES = {"__pycache__", "dist-packages", "ensurepip", "idlelib"}
_SKIPPED_DIRECTORIES |= {"lib2to3", "site-packages", "test", "tests"}
_TOPICS = "pydoc_data/topics.py"
_HELD_OUT_PERCENT = {"text": 2, "docstrings": 10}
_MIN_ANSWER_BYTES = 20
_MAX_ANSWER_BYTES = 200

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | _Definition


class Docstring(NamedTuple):
    """One documented definition: the answer that it gives and the lines that it takes."""

    name: str
    is_class: bool
    is_public: bool
    answer: str
    lines: range


class Module(NamedTuple):
    """One file: path from the library's folder, source, docstrings, and topics of `help()`."""

    path: str
    source: str
    docstrings: list[Docstring]
    topics: dict[str, str]


def text_rows(split: str = "train", root: Path | None = None) -> list[dict[str, str]]:
    """Return the library's modules and language reference as rows with `text`.

    `root` is the library's folder (default: this Python's own). Raises ValueError for an unknown
    split, or where the folder has no Python file.
    """
    _check_split(split)
    modules = list(read_modules(root or _library()))
    answers = {_key(d.answer) for d in questions(modules) if _is_held_out(d.name, "docstrings")}
    rows = []
    for module in modules:
        documents = module.topics or {module.path: _without(answers, module)}
        for name, text in documents.items():
            if _is_held_out(name, "text") == (split == "validation") and text.strip():
                rows.append({"text": text})
    return rows


def docstring_rows(split: str = "train", root: Path | None = None) -> list[dict[str, str]]:
    """Return questions on public functions and classes as rows with `prompt` and `completion`.

    Which side a question falls on is decided by the hash of its qualified name; an answer occurs
    once in both sides together. Raises ValueError as `text_rows` does.
    """
    _check_split(split)
    return [
        {"prompt": _question(docstring), "completion": docstring.answer}
        for docstring in (questions(read_modules(root)) if root else _own_questions())
        if _is_held_out(docstring.name, "docstrings") == (split == "validation")
    ]


def questions(modules: Iterable[Module]) -> list[Docstring]:
    """Return the public docstrings in order, each name and each answer once.

    A property has several definitions of one name.
    """
    found: dict[str, Docstring] = {}
    names: set[str] = set()
    for docstring in (d for module in modules for d in module.docstrings if d.is_public):
        if docstring.name not in names:
            names.add(docstring.name)
            found.setdefault(_key(docstring.answer), docstring)
    return list(found.values())


def read_modules(root: Path) -> Iterator[Module]:
    """Yield every module under `root`, sorted by path."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not _SKIPPED_DIRECTORIES.intersection(name.split("/"))]
    if not names:
        raise ValueError(
            f"the standard library's folder {root} has no Python files: "
            "install Python with its library, or name another --dataset"
        )
    for name in names:
        try:
            source = (root / name).read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files hold Python 2 or Latin-1 on purpose
            continue
        dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        is_public = not any(part.startswith("_") for part in dotted.split("."))
        topics = _topics(tree) if name == _TOPICS else {}
        yield Module(name, source, list(_docstrings(tree, dotted, is_public, False)), topics)


def _docstrings(node: ast.AST, name: str, is_public: bool, is_local: bool) -> Iterator[Docstring]:
    """Yield the docstrings of `node` and of all below, without a look into expressions.

    Public is no module, no name with a leading underscore, nothing in a function or a branch.
    """
    if isinstance(node, _Documented) and (answer := _answer(node)):
        first, last = node.body[0].lineno, node.body[0].end_lineno
        asked = is_public and not isinstance(node, ast.Module)
        is_class = isinstance(node, ast.ClassDef)
        yield Docstring(name, is_class, asked, answer, range(first - 1, last or first))
    is_local = is_local or not isinstance(node, ast.Module | ast.ClassDef)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            is_open = is_public and not is_local and not child.name.startswith("_")
            yield from _docstrings(child, f"{name}.{child.name}", is_open, False)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child, name, is_public, True)


def _answer(node: _Documented) -> str | None:
    """Return the first paragraph of a docstring, or its first sentence where that is too long."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    if len(paragraph.encode()) > _MAX_ANSWER_BYTES:
        paragraph = paragraph.split(". ")[0] + "."
    fits = _MIN_ANSWER_BYTES <= len(paragraph.encode()) <= _MAX_ANSWER_BYTES
    return paragraph if fits and not paragraph.startswith(">>>") else None


def _question(docstring: Docstring) -> str:
    verb = f"What is {docstring.name}?" if docstring.is_class else f"What does {docstring.name} do?"
    return verb + "\n"


def _without(answers: set[str], module: Module) -> str:
    """Return the source without the docstrings that give one of `answers`."""
    lines = module.source.splitlines(keepends=True)
    for docstring in module.docstrings:
        if _key(docstring.answer) in answers:
            for line in docstring.lines:
                lines[line] = ""
    return "".join(lines)


def _topics(tree: ast.Module) -> dict[str, str]:
    """Return the language reference that `help()` shows: topic to text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {f"topics/{name}": text for name, text in ast.literal_eval(node.value).items()}
    return {}


def _is_held_out(name: str, corpus: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT[corpus]


def _key(answer: str) -> str:
    return answer.casefold().rstrip(".")


@cache
def _own_questions() -> list[Docstring]:
    """Return `questions` of this Python's library: both splits are of one reading, of seconds."""
    return questions(read_modules(_library()))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"dataset_split {split!r} is not a split of this corpus: use {SPLITS}")
