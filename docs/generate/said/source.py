"""The source of megalora as the pages of messages read it: files, scopes, and texts resolved."""

import ast
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# A sentence in more forms than these is given once, with a placeholder for what differs.
MAX_FORMS = 8
MAX_CALLS = 24
MAX_RETURNS = 3
# How far a text is followed, through names and functions.
MAX_DEPTH = 6
# A list of names is written out up to so many characters.
MAX_LIST = 160


class Form(NamedTuple):
    """One form of a text: placeholders in braces, and the strings of the source that it is of."""

    text: str
    parts: frozenset[ast.AST] = frozenset()


@dataclass(eq=False)
class Module:
    """A file of Python, by its path in the checkout."""

    path: str
    tree: ast.Module
    others: Mapping[str, "Module"] = field(default_factory=dict, repr=False)
    # What its texts come to, by node, and the rules that some of them fall under.
    forms: dict[tuple[ast.AST, bool], list[Form]] = field(default_factory=dict, repr=False)
    rules: set[str] = field(default_factory=set, repr=False)

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """Return what each node stands in."""
        found: dict[ast.AST, ast.AST] = {}
        stack: list[ast.AST] = [self.tree]
        while stack:
            node = stack.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr_context | ast.operator):
                    continue
                found[child] = node
                stack.append(child)
        return found

    def all[T: ast.expr | ast.stmt](self, kind: type[T]) -> list[T]:
        """Return all nodes of a kind, from the top down."""
        found = [node for node in self.parents if isinstance(node, kind)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        """Return what is assigned at the top, once."""
        found: dict[str, list[ast.expr]] = {}
        for node in self.tree.body:
            for name, value in _assigned(node):
                found.setdefault(name, []).append(value)
        return {name: values[0] for name, values in found.items() if len(values) == 1}

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        """Return the functions at the top."""
        return {node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef)}

    @cached_property
    def errors(self) -> set[str]:
        """Return the names of the errors that are defined here."""
        classes = (node for node in self.tree.body if isinstance(node, ast.ClassDef))
        return {
            one.name
            for one in classes
            if any(ast.unparse(base).endswith(("Error", "Exception")) for base in one.bases)
        }

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Return what is imported by name: the path of its file, and its name there."""
        found = {}
        for node in self.all(ast.ImportFrom):
            if node.module:
                path = node.module.replace(".", "/")
                for name in node.names:
                    for file in (f"{path}.py", f"{path}/__init__.py"):
                        if file in self.others:
                            found[name.asname or name.name] = (file, name.name)
        return found

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield what a node stands in, from the inside out."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def function_of(self, node: ast.AST) -> ast.AST | None:
        """Return the function that a node stands in, None at the top."""
        return next((one for one in self.around(node) if isinstance(one, FUNCTIONS)), None)

    def definition_of(self, node: ast.AST) -> str:
        """Return the names of the classes and functions around a node, as `A.b`.

        At the top it is the constant that the node is assigned to.
        """
        kinds = (ast.FunctionDef, ast.ClassDef)
        around = list(self.around(node))
        names = [one.name for one in around if isinstance(one, kinds)]
        tops = [name for one in around for name, _ in _assigned(one)]
        return ".".join(reversed(names)) if names else next(iter(tops), "")

    def names_of(self, function: ast.AST) -> tuple[dict[str, list[ast.expr]], Counter[str]]:
        """Return what a function assigns to its names, and how often it gives each a value."""
        if function not in self._names:
            values: dict[str, list[ast.expr]] = {}
            binds: Counter[str] = Counter()
            for node in ast.walk(function):
                for name, value in _assigned(node):
                    values.setdefault(name, []).append(value)
                if (bound := _bound_name(node)) is not None:
                    binds[bound] += 1
            self._names[function] = values, binds
        return self._names[function]

    @cached_property
    def _names(self) -> dict[ast.AST, tuple[dict[str, list[ast.expr]], Counter[str]]]:
        return {}

    @cached_property
    def calls(self) -> dict[str, list[ast.Call]]:
        """Return the calls of functions of this file, by name."""
        found: dict[str, list[ast.Call]] = {}
        for node in self.all(ast.Call):
            if isinstance(node.func, ast.Name):
                found.setdefault(node.func.id, []).append(node)
        return found


@dataclass(frozen=True, eq=False)
class Scope:
    """Where names are looked up: a function of a module, and what some names are bound to."""

    module: Module
    function: ast.AST | None
    bound: Mapping[str, tuple[ast.expr, "Scope"]] = field(default_factory=dict)

    def assigned(self, name: str) -> list[ast.expr] | None:
        """Return all values that a name of the function gets, None where some cannot be told."""
        if self.function is None:
            return None
        values, binds = self.module.names_of(self.function)
        found = values.get(name, [])
        return found if found and binds[name] == len(found) else None


def read_sources(root: Path = ROOT) -> dict[str, Module]:
    """Return the files that a user's messages come from, by path in the checkout."""
    files = [*root.glob("megalora/**/*.py"), *root.glob("examples/*.py"), root / "setup.py"]
    modules: dict[str, Module] = {}
    for file in sorted(files):
        path = file.relative_to(root).as_posix()
        modules[path] = Module(path, ast.parse(file.read_text()), modules)
    return modules


def is_text(node: ast.AST) -> bool:
    """Say whether an expression puts a text together."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr)


def forms_of(node: ast.expr, scope: Scope, *, every_call: bool) -> list[Form]:
    """Return the texts that an expression of the source comes to, each with its placeholders.

    With `every_call` it is resolved for each call of its function in its file and each turn of the
    loops around it, where they give texts, and as it stands where that makes too many.
    """
    plain = _texts(node, scope, 0) or []
    if not every_call:
        return plain
    found: dict[str, Form] = {}
    for one in _scopes(node, scope, 0):
        for form in _texts(node, one, 0) or []:
            known = found.get(form.text)
            found[form.text] = Form(form.text, form.parts | (known.parts if known else frozenset()))
    return list(found.values()) if 0 < len(found) <= MAX_CALLS else plain


# === Texts ===


def _texts(node: ast.expr, scope: Scope, depth: int) -> list[Form] | None:
    """Return the forms of a text, None where an expression is none that can be told."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [Form(node.value.replace("{}", "{names}"), frozenset([node]))]
    if isinstance(node, ast.JoinedStr):
        return _joined([_filled(one, scope, depth) for one in node.values], node.values, node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and is_text(node):
        sides = [node.left, node.right]
        return _joined([_texts(one, scope, depth) or [_hole(one)] for one in sides], sides, node)
    if isinstance(node, ast.IfExp):
        return _both([node.body, node.orelse], scope, depth)
    if isinstance(node, ast.Name):
        return _named(node.id, scope, depth)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        place, names = node.slice.value, _names(node.value, scope)
        return [Form(names[place])] if names and isinstance(place, int) else None
    return _called(node, scope, depth) if isinstance(node, ast.Call) else None


def _joined(parts: Sequence[list[Form]], nodes: Sequence[ast.expr], node: ast.AST) -> list[Form]:
    """Return each way to put parts together; of many, one with placeholders for what differs."""
    if math.prod(len(part) for part in parts) > MAX_FORMS:
        pairs = zip(parts, nodes, strict=True)
        parts = [part if len(part) == 1 else [_hole(one)] for part, one in pairs]
    return [
        Form("".join(form.text for form in one), frozenset([node]).union(*(f.parts for f in one)))
        for one in itertools.product(*parts)
    ]


def _filled(part: ast.expr, scope: Scope, depth: int) -> list[Form]:
    """Return the forms of a part of an f-string."""
    if isinstance(part, ast.Constant):
        return [Form(str(part.value))]
    if isinstance(part, ast.FormattedValue):
        return _filled_in(part, scope, depth)
    return [_hole(part)]


def _filled_in(part: ast.FormattedValue, scope: Scope, depth: int) -> list[Form]:
    """Return the forms of what braces hold: numbers and texts of the source, else a placeholder."""
    number = _number(part.value, scope)
    if number is not None:
        spec = part.format_spec
        shape = "".join(_constants(spec.values)) if isinstance(spec, ast.JoinedStr) else ""
        return [Form(format(number, shape))]
    forms = _texts(part.value, scope, depth + 1)
    if not forms or len(forms) > MAX_FORMS:
        return [_hole(part.value)]
    quotes = "'" if part.conversion == ord("r") else ""
    return [Form(f"{quotes}{form.text}{quotes}", form.parts) for form in forms]


def _both(values: Sequence[ast.expr], scope: Scope, depth: int) -> list[Form] | None:
    found: list[Form] = []
    for value in values:
        forms = _texts(value, scope, depth + 1)
        if forms is None:
            return None
        found += forms
    return found


def _named(name: str, scope: Scope, depth: int) -> list[Form] | None:
    """Return the forms of what a name stands for: a constant, or all that is assigned to it."""
    if name in scope.bound:
        value, where = scope.bound[name]
        return _texts(value, where, depth + 1)
    values = scope.assigned(name)
    if values is not None:
        return _both(values, scope, depth)
    found = _constant(name, scope)
    return found and _texts(found[0], found[1], depth + 1)


def _constant(name: str, scope: Scope) -> tuple[ast.expr, Scope] | None:
    """Return what a name of the module, or one imported from another, is, and where that is."""
    module = scope.module
    if scope.function is not None and name in module.names_of(scope.function)[1]:
        return None
    if name in module.imported:
        path, name = module.imported[name]
        module = module.others[path]
    value = module.constants.get(name)
    return None if value is None else (value, Scope(module, None))


def _called(call: ast.Call, scope: Scope, depth: int) -> list[Form] | None:
    """Return the forms of what a call gives: a joined list of constants, a function's text."""
    if isinstance(call.func, ast.Attribute) and call.func.attr == "join" and len(call.args) == 1:
        names = _names(call.args[0], scope)
        between = call.func.value
        if names and isinstance(between, ast.Constant):
            text = str(between.value).join(names)
            return [Form(text)] if len(text) <= MAX_LIST else None
        return None
    if isinstance(call.func, ast.Attribute) and call.func.attr == "replace":
        old, new = (_constants(call.args) + ["", ""])[:2]
        forms = _texts(call.func.value, scope, depth + 1) if old else None
        return forms and [Form(form.text.replace(old, new), form.parts) for form in forms]
    if not isinstance(call.func, ast.Name):
        return None
    if call.func.id in ("str", "printable", "shlex") and call.args:
        return _texts(call.args[0], scope, depth + 1)
    function, module = scope.module.functions.get(call.func.id), scope.module
    if function is None and call.func.id in module.imported:
        path, name = module.imported[call.func.id]
        module = module.others[path]
        function = module.functions.get(name)
    if function is None:
        return None
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    texts = [value for value in returned if value is not None]
    if not 0 < len(texts) == len(returned) <= MAX_RETURNS:
        return None
    forms = _both(texts, Scope(module, function, _bound(function, call, scope)), depth)
    # Of several only sentences: that of a mere word is better told by a placeholder.
    telling = len(texts) == 1 or any(form.text.count(" ") > 2 for form in forms or ())
    return forms if telling else None


def _names(node: ast.expr, scope: Scope) -> list[str] | None:
    """Return the texts of a constant list, or of the keys of a constant table."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        if node.func.id in ("sorted", "list", "tuple"):
            names = _names(node.args[0], scope)
            return sorted(names) if names and node.func.id == "sorted" else names
        return None
    if isinstance(node, ast.Name):
        if node.id in scope.bound:
            return _names(*scope.bound[node.id])
        found = _constant(node.id, scope)
        return found and _names(*found)
    if isinstance(node, ast.Dict):
        elements = [key for key in node.keys if key is not None]
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        elements = node.elts
    else:
        return None
    texts = _constants(elements)
    return texts if len(texts) == len(elements) else None


def _constants(nodes: Sequence[ast.expr]) -> list[str]:
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def _number(node: ast.expr, scope: Scope) -> int | float | None:
    """Return the number that a name of the module or an expression of numbers stands for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return None if isinstance(node.value, bool) else node.value
    if isinstance(node, ast.Name):
        bound = scope.bound.get(node.id)
        if bound is not None:
            return _number(*bound)
        found = _constant(node.id, scope)
        return found and _number(*found)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Pow | ast.LShift):
        left, right = _number(node.left, scope), _number(node.right, scope)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.LShift):
            return int(left) << int(right)
        return left * right if isinstance(node.op, ast.Mult) else left**right
    return None


# === Placeholders ===


def _hole(node: ast.expr) -> Form:
    """Return the placeholder of a value that only a run knows, named as the source names it."""
    if isinstance(node, ast.FormattedValue):
        node = node.value
    return Form(f"{{{_hole_name(node)}}}")


def _hole_name(node: ast.AST) -> str:
    chain: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        chain.append(inner.attr)
        inner = inner.value
    if isinstance(inner, ast.Name):
        own = [] if chain and inner.id in ("self", "args", "cls") else [inner.id]
        return ".".join(own + chain[::-1]).strip("_")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
        return "value"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_own(node.func):
        return _hole_name(node.func)
    if isinstance(node, ast.Call) and node.args:
        return _hole_name(node.args[-1 if ast.unparse(node.func) == "map" else 0])
    if isinstance(node, ast.Call):
        return _hole_name(node.func)
    if isinstance(node, ast.Subscript | ast.Starred | ast.Attribute):
        return _hole_name(node.value)
    inside = (_hole_name(child) for child in ast.iter_child_nodes(node))
    return next((name for name in inside if name != "..."), "...")


def _is_own(method: ast.Attribute) -> bool:
    """Say whether a call is named better by its method, as x.scale(r), than by what it is given."""
    of_module = isinstance(method.value, ast.Name) and method.value.id in _MODULES
    return not of_module and method.attr not in ("join", "get", "format", "replace", "removesuffix")


_MODULES = ("os", "shlex", "json", "reprlib", "math")


# === Scopes ===


def _scopes(node: ast.AST, scope: Scope, depth: int) -> list[Scope]:
    """Return the scope of a node for each call of its function and each turn of its loops."""
    found = [scope]
    function = scope.function
    if isinstance(function, ast.FunctionDef) and depth < 2:
        calls = scope.module.calls.get(function.name, [])
        if scope.module.functions.get(function.name) is function and 0 < len(calls) <= MAX_CALLS:
            found = [
                Scope(scope.module, function, _bound(function, call, outer))
                for call in calls
                for outer in _scopes(
                    call, Scope(scope.module, scope.module.function_of(call)), depth + 1
                )
            ]
    for loop in scope.module.around(node):
        if loop is function:
            break
        if isinstance(loop, ast.For):
            found = [turn for one in found for turn in _turns(loop, one)]
    return found


def _bound(
    function: ast.FunctionDef, call: ast.Call, scope: Scope
) -> dict[str, tuple[ast.expr, Scope]]:
    """Return what the parameters of a function are in a call of it."""
    if any(isinstance(arg, ast.Starred) for arg in call.args):
        return {}
    names = [arg.arg for arg in function.args.args]
    given = dict(zip(names, call.args, strict=False))
    given |= {word.arg: word.value for word in call.keywords if word.arg}
    return {name: (value, scope) for name, value in given.items()}


def _turns(loop: ast.For, scope: Scope) -> list[Scope]:
    """Return the scope of each turn of a loop over a constant list, itself where it is none."""
    source, where = loop.iter, scope
    pairs = isinstance(source, ast.Call) and ast.unparse(source.func).endswith(".items")
    if pairs:
        assert isinstance(source, ast.Call)
        assert isinstance(source.func, ast.Attribute)
        source = source.func.value
    if isinstance(source, ast.Name):
        found = _constant(source.id, scope)
        if found is None:
            return [scope]
        source, where = found
    if isinstance(source, ast.Dict):
        keys = [key for key in source.keys if key is not None]
        rows = [list(row) for row in zip(keys, source.values, strict=False)]
        rows = rows if pairs else [row[:1] for row in rows]
    elif isinstance(source, ast.Tuple | ast.List):
        several = isinstance(loop.target, ast.Tuple)
        rows = [_elements(one) if several else [one] for one in source.elts]
    else:
        return [scope]
    targets = _elements(loop.target)
    turns = []
    for row in rows:
        if len(row) != len(targets):
            return [scope]
        names = zip(targets, row, strict=True)
        bound = {name.id: (value, where) for name, value in names if isinstance(name, ast.Name)}
        turns.append(replace(scope, bound={**scope.bound, **bound}))
    return turns or [scope]


def _elements(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple | ast.List) else [node]


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names that a plain assignment gives a value, with it."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(name, ast.Name):
                        yield name.id, value
    elif isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
        yield node.target.id, node.value


def _bound_name(node: ast.AST) -> str | None:
    """Return the name that a node gives a value, by assignment or else."""
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.ExceptHandler):
        return node.name
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
