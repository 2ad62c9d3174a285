"""Real text that every machine has: the source and the documentation of Python's standard library.

Two corpora, read with `ast` and never imported, in an order and a split that depend on nothing but
the files: `stdlib-text` (rows with `text`, for pretraining) and `stdlib-docstrings` (rows with
`prompt` and `completion`: what does a function do? what its docstring says). The answers held out
from the second are cut out of the first, so that no held-out answer is ever trained on.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
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

type _Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Docstring(NamedTuple):
    """One documented definition: its qualified name, what it is and the answer it gives."""

    name: str
    is_class: bool
    answer: str


def text_rows(split: str = "train", root: Path | None = None) -> list[dict[str, str]]:
    """Return the library's modules and language reference as rows with `text`.

    `root` is the library's folder (default: this Python's own). Raises ValueError for an unknown
    split, or where the folder has no Python file.
    """
    _check_split(split)
    root = root or _library()
    held_out = {_key(d.answer) for d in docstrings(root) if _is_held_out(d.name, "docstrings")}
    rows = []
    for name, source, tree in _modules(root):
        documents = _topics(tree) if name == _TOPICS else {name: _without(held_out, source, tree)}
        for document, text in documents.items():
            if _is_held_out(document, "text") == (split == "validation") and text.strip():
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
        for docstring in docstrings(root or _library())
        if _is_held_out(docstring.name, "docstrings") == (split == "validation")
    ]


def docstrings(root: Path) -> list[Docstring]:
    """Return every public docstring's first sentence or paragraph, in order.

    Each name (a property has several definitions) and each answer occurs once.
    """
    found: dict[str, Docstring] = {}
    names: set[str] = set()
    for path, _, tree in _modules(root):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module.startswith("_") or "._" in module:
            continue
        for docstring in _definitions(tree, module):
            if docstring.name not in names:
                names.add(docstring.name)
                found.setdefault(_key(docstring.answer), docstring)
    return list(found.values())


def _definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Docstring]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = f"{prefix}.{child.name}"
        if child.name.startswith("_"):
            continue
        is_class = isinstance(child, ast.ClassDef)
        if answer := _answer(child):
            yield Docstring(name, is_class, answer)
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, name)


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


def _without(answers: set[str], source: str, tree: ast.Module) -> str:
    """Return `source` without the docstrings that give one of `answers`."""
    lines = source.splitlines(keepends=True)
    for node in _documented(tree):
        answer = _answer(node)
        if answer and _key(answer) in answers:
            expression = node.body[0]
            for line in range(expression.lineno - 1, expression.end_lineno or expression.lineno):
                lines[line] = ""
    return "".join(lines)


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """Yield `node` and all below that can have a docstring, without a look into expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child)


def _topics(tree: ast.Module) -> dict[str, str]:
    """Return the language reference that `help()` shows: topic to text."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {f"topics/{name}": text for name, text in ast.literal_eval(node.value).items()}
    return {}


def _modules(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield path relative to `root`, source and syntax tree of every module, sorted by path."""
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
            yield name, source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files hold Python 2 or Latin-1 on purpose
            continue


def _is_held_out(name: str, corpus: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < _HELD_OUT_PERCENT[corpus]


def _key(answer: str) -> str:
    return answer.casefold().rstrip(".")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"dataset_split {split!r} is not a split of this corpus: use {SPLITS}")
