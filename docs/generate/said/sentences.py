"""Every sentence of megalora's source that a user can meet, and every `raise`, accounted for."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from docs.generate.said.remedies import LABEL
from docs.generate.said.rules import BEGINNINGS, FORWARDS, NOT_MESSAGES, NOT_MESSAGES_IN, PROTOCOL
from docs.generate.said.source import ROOT, Form, Module, Scope, forms_of, is_text

# Keywords whose text is of --help, or of a table in the source, and no message.
HELP = {"help", "description", "epilog", "metavar", "usage", "title"}
ERROR = re.compile(r"(Error|Exception|SystemExit|HTTPException)$")
# A text of so many words can be a sentence.
MIN_WORDS = 3


@dataclass(frozen=True)
class Said:
    """A sentence, or a part of one, and a place in the source that says it."""

    text: str
    kind: str
    path: str
    place: str
    line: int
    # The sentences of one call are of one site: they share what is said of them.
    site: str = ""


@dataclass(frozen=True)
class Raised:
    """A `raise` statement and what accounts for it: sentences, or the rule that it falls under."""

    path: str
    line: int
    source: str
    texts: tuple[str, ...]
    rule: str | None


def sentences(modules: Mapping[str, Module]) -> list[Said]:
    """Return all that is said by some modules: what errors and warnings say, then their parts."""
    used: set[ast.AST] = set()
    found = [said for module in modules.values() for said in _of_errors(module, used)]
    parts = [
        (module, node, form)
        for module in modules.values()
        for node in _texts_outside(module, module.tree)
        if node not in used and not _is_left_out(module, node)
        for form in _forms(module, node, every_call=False)
        if words(form.text) >= MIN_WORDS
    ]
    inner = {part for _, node, form in parts for part in form.parts if part is not node}
    for module, node, form in parts:
        if node not in inner:
            found.append(_said(module, node, form.text, kind_of(form.text)))
    return found


def raises(modules: Mapping[str, Module]) -> list[Raised]:
    """Return every `raise` of some modules with what accounts for it."""
    found = []
    for module in modules.values():
        for node in module.all(ast.Raise):
            texts = tuple(form.text for form in _raised(module, node))
            rule = None if texts else _rule(module, node)
            source = "" if node.exc is None else ast.unparse(node.exc)
            found.append(Raised(module.path, node.lineno, source, texts, rule))
    return found


def _of_errors(module: Module, used: set[ast.AST]) -> Iterator[Said]:
    """Yield what the errors and warnings of a module say, and add its texts to `used`."""
    for node in module.all(ast.Call):
        if (arg := _message_of(node, module)) is not None:
            forms = _forms(module, arg)
            used.update(*(form.parts for form in forms), [arg] if forms else [])
            kind = "warning" if ast.unparse(node.func) == "warnings.warn" else "error"
            for form in forms:
                yield _said(module, node, form.text, kind)


def _said(module: Module, node: ast.AST, text: str, kind: str) -> Said:
    line = getattr(node, "lineno", 0)
    site = f"{module.path}:{line}:{getattr(node, 'col_offset', 0)}"
    if kind == "part":
        text = BEGINNINGS.get(f"{module.path}:{module.definition_of(node)}", "") + text
    return Said(" ".join(text.split()), kind, module.path, module.definition_of(node), line, site)


def _forms(module: Module, node: ast.expr, *, every_call: bool = True) -> list[Form]:
    """Return the forms of a message that have words of their own."""
    key = node, every_call
    if key not in module.forms:
        scope = Scope(module, module.function_of(node))
        module.forms[key] = forms_of(node, scope, every_call=every_call)
    forms = module.forms[key]
    return [form for form in forms if words(LABEL.sub("", form.text)) > 0]


def _message_of(call: ast.Call, module: Module) -> ast.expr | None:
    """Return the text that a call says as an error or a warning, None where it is no such call."""
    name = ast.unparse(call.func)
    says = name == "warnings.warn" or name.endswith(".error") or name in module.errors
    if not says and not ERROR.search(name):
        return None
    return call.args[0] if call.args and name not in PROTOCOL else None


def _raised(module: Module, node: ast.Raise) -> list[Form]:
    """Return what a `raise` says itself, or by the function of ours that makes its error."""
    if not isinstance(node.exc, ast.Call):
        return []
    arg = _message_of(node.exc, module)
    if arg is not None:
        return _forms(module, arg)
    name = ast.unparse(node.exc.func).split(".")[-1]
    path, known = module.imported.get(name, (module.path, name))
    home = module.others[path]
    for function in ast.walk(home.tree):
        if isinstance(function, ast.FunctionDef) and function.name == known:
            made = [one for one in ast.walk(function) if isinstance(one, ast.Call)]
            args = [arg for one in made if (arg := _message_of(one, home)) is not None]
            return [form for arg in args for form in _forms(home, arg)]
    return []


def _rule(module: Module, node: ast.Raise) -> str | None:
    """Return the rule that accounts for a `raise` without a sentence of its own, None without."""
    if node.exc is None:
        return "raises again what it caught"
    name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
    if name in PROTOCOL:
        return PROTOCOL[name]
    return FORWARDS.get(f"{module.path}:{module.definition_of(node)}")


# === Sentences outside of errors ===


def _texts_outside(module: Module, node: ast.AST) -> Iterator[ast.expr]:
    """Yield the longest texts below a node that are no documentation and no --help."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.keyword) and child.arg in HELP:
            continue
        if isinstance(child, ast.expr) and is_text(child):
            if words(_plain(child)) >= MIN_WORDS:
                yield child
            continue
        yield from _texts_outside(module, child)


def _plain(node: ast.expr) -> str:
    """Return a text without what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return f"{_plain(node.left)} {{}} {_plain(node.right)}"
    if isinstance(node, ast.JoinedStr):
        return "".join(_plain(part) for part in node.values)
    return "{}"


def words(text: str) -> int:
    """Return how many words of letters a text has outside of its placeholders."""
    return sum(bool(_WORD.fullmatch(word)) for word in re.sub(r"\{[^{}]*\}", "", text).split())


_WORD = re.compile(r"[(`'\"]*[A-Za-z]['A-Za-z-]+[)`'\",.;:]*")


def kind_of(text: str) -> str:
    """Return what a text outside of errors is: a warning, a line of a run, or a part."""
    start = text.lstrip()
    if start.startswith(("WARNING", "warning:")):
        return "warning"
    if start.startswith("error:"):
        return "error"
    return "line" if start.startswith(("> LoRA:", "megalora:")) else "part"


def _is_left_out(module: Module, node: ast.AST) -> bool:
    """Say whether a text is no message by the rules: its file, its function, the call it is in."""
    place = f"{module.path}:{module.definition_of(node)}"
    found = [rule for rule in NOT_MESSAGES if covers(rule, place)]
    calls = (one for one in module.around(node) if isinstance(one, ast.Call))
    names = [ast.unparse(one.func).split(".")[-1] for one in calls]
    found += [call for call in NOT_MESSAGES_IN if call in names]
    module.rules.update(found)
    return bool(found)


def covers(rule: str, place: str) -> bool:
    """Say whether a rule, `folder/`, `file.py` or `file.py:Name`, is of a place."""
    path, _, name = rule.partition(":")
    file, _, inside = place.partition(":")
    if not name:
        return file == path or (path.endswith("/") and file.startswith(path))
    return file == path and (inside == name or inside.startswith(f"{name}."))


# === C++ ===

CHECK = re.compile(r"(?<!void )\bcheck_(?:value|that)\s*\(")


def sentences_of_ops(root: Path = ROOT) -> list[Said]:
    """Return what the checks of csrc say, each argument that is no text as a placeholder."""
    found = []
    for file in sorted(path for path in root.glob("csrc/**/*") if path.suffix in _CODE):
        text = file.read_text()
        for match in CHECK.finditer(text):
            _, *said = _arguments(text, match.end())
            path, line = file.relative_to(root).as_posix(), text.count("\n", 0, match.start()) + 1
            found += [
                Said(one, "error", path, "", line, f"{path}:{line}") for one in _said_by(said)
            ]
    return found


_CODE = {".h", ".cpp", ".cu", ".cuh"}
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def _arguments(text: str, start: int) -> list[str]:
    """Return the arguments of a call whose bracket opens before `start`, by its commas."""
    found, depth, last, at = [], 0, start, start
    while True:
        letter = text[at]
        if letter == '"':
            at = _STRING.match(text, at).end()  # type: ignore[union-attr]
            continue
        if letter in "([{":
            depth += 1
        elif letter in ")]}" and depth:
            depth -= 1
        elif letter in ",)" and not depth:
            found.append(text[last:at].strip())
            last = at + 1
            if letter == ")":
                return found
        at += 1


def _said_by(arguments: list[str]) -> list[str]:
    """Return the sentences that the arguments of a check come to."""
    sentences = [""]
    for argument in arguments:
        texts = ["".join(_STRING.findall(part)) for part in argument.split(' : "')]
        if " ? " in argument and '"' in argument:
            forms = _STRING.findall(argument)
        elif argument.startswith('"'):
            forms = ["".join(texts)]
        else:
            forms = [f"{{{re.split(r'[.(]|->', argument.removeprefix('static_cast<int>('))[0]}}}"]
        sentences = [start + form for start in sentences for form in forms]
    return [" ".join(one.replace('\\"', '"').split()) for one in sentences]
