"""The rules of the house, as functions of its source: who imports whom, and what is untidy."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

# From the ground up: a room, a file or a folder of megalora/, imports only what stands before it.
ROOMS = (
    *("replace", "installed", "printable", "quiet", "progress", "misspelt", "reading", "built"),
    *("config", "arguments", "model", "targets", "ops", "mends"),
    *("cpu", "data"),
    *("adapters", "recommend", "checkpoint", "hf", "builder", "__init__"),
    *("losses", "sync", "rollouts", "policy", "training", "launch", "run", "plan", "environment"),
    "__main__",
)
# Everything else can be imported before Megatron is.
IMPORT_MEGATRON = (
    *(
        "adapters/",
        "checkpoint/",
        "builder.py",
        "mends/",
        "cpu/",
        "hf/exchange.py",
        "hf/one_process.py",
        "sync/tensors.py",
        "rollouts/megatron.py",
        "rollouts/from_flags.py",
        "policy/policy.py",
        "policy/report.py",
        "policy/shards.py",
    ),
    *("data/batch.py", "data/indexed.py"),
    *("training/session.py", "training/outputs.py", "training/patches.py", "training/parsing.py"),
    *("training/compared.py", "training/not_finite.py", "training/replicas.py"),
    "training/inside.py",
    "training/vocabulary.py",
    *("plan/assumed.py", "plan/step.py", "plan/script.py", "plan/pretrain.py", "plan/rank.py"),
    *("plan/memory.py", "plan/traffic.py", "plan/work.py", "plan/child.py", "plan/untouched.py"),
    *("plan/gpu.py", "plan/flags.py", "plan/holdings.py", "plan/ranks.py", "plan/contract.py"),
    "plan/floor.py",
)
BEFORE_MEGATRON = ("mends/__init__.py", "cpu/__init__.py")

FILE_LINES, FUNCTION_LINES = 300, 40

type Sources = Mapping[str, str]
type Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)


class Spot(NamedTuple):
    """A module or a statement, and the functions and classes around it."""

    file: str
    node: ast.AST
    around: tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, ...]

    @property
    def names(self) -> list[str]:
        """Return the names of all around, and its own."""
        own = (self.node,) if isinstance(self.node, DEFINITIONS) else ()
        return [definition.name for definition in (*self.around, *own)]

    @property
    def place(self) -> str:
        """Return where it is, as in `run.py:main`."""
        return ":".join([self.file, *filter(None, [".".join(self.names)])])

    @property
    def waits_for_a_call(self) -> bool:
        """Return whether it is inside a function."""
        return any(isinstance(definition, FUNCTIONS) for definition in self.around)


@cache
def spots_of(file: str, text: str) -> list[Spot]:
    """Return a module and its statements, but for those that only type checkers read."""
    found, stack = [], [Spot(file, ast.parse(text), ())]
    while stack:
        spot = stack.pop()
        node, around = spot.node, spot.around
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found.append(spot)
        inside = (*around, node) if isinstance(node, DEFINITIONS) else around
        children = (child for child in ast.iter_child_nodes(node) if isinstance(child, BLOCKS))
        stack += [Spot(file, child, inside) for child in children]
    return found


def spots(sources: Sources) -> Iterator[Spot]:
    """Yield the modules and statements of all files."""
    for file, text in sources.items():
        yield from spots_of(file, text)


# === Who imports whom ===


def names_imported(spot: Spot) -> list[str]:
    """Return the full names that a statement imports."""
    if isinstance(spot.node, ast.ImportFrom):
        return [f"{spot.node.module}.{alias.name}" for alias in spot.node.names]
    return [alias.name for alias in spot.node.names] if isinstance(spot.node, ast.Import) else []


def room_of(file: str) -> str:
    """Return the room of a file."""
    return file.split("/")[0].removesuffix(".py")


def room_named(name: str) -> str:
    """Return the room that a full name stands in; what is no room is the plugin's face."""
    room = [*name.split("."), ""][1]
    return room if room in ROOMS else "__init__"


def upward_imports(sources: Sources) -> set[str]:
    """Return the files that import, at the top or later, from a room above their own."""
    return {
        f"{spot.file} -> {room_named(name)}"
        for spot in spots(sources)
        for name in names_imported(spot)
        if name.split(".")[0] == "megalora"
        and ROOMS.index(room_named(name)) > ROOMS.index(room_of(spot.file))
    }


def files_of(name: str, sources: Sources) -> set[str]:
    """Return the files that run where a full name is imported, but for megalora/__init__.py."""
    parts = name.split(".")[1:] if name.startswith("megalora.") else []
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return {f"{path}{end}" for path in paths for end in (".py", "/__init__.py")} & sources.keys()


def imported_at_top(sources: Sources) -> dict[str, set[str]]:
    """Return for each file those that its import runs, and `megatron` among them."""
    found: dict[str, set[str]] = {file: set() for file in sources}
    for spot in spots(sources):
        for name in [] if spot.waits_for_a_call else names_imported(spot):
            found[spot.file] |= files_of(name, sources) - {spot.file}
            found[spot.file] |= {"megatron"} & {name.split(".")[0]}
    return found


def early_megatron(sources: Sources) -> set[str]:
    """Return the files whose import imports Megatron where it must not, and by what it does."""
    imports = imported_at_top(sources)
    with_megatron = {"megatron"}
    while more := {f for f, run in imports.items() if run & with_megatron} - with_megatron:
        with_megatron |= more
    before = [f for f in sources if f in BEFORE_MEGATRON or not f.startswith(IMPORT_MEGATRON)]
    return {f"{file} -> {other}" for file in before for other in imports[file] & with_megatron}


# === What may only shrink ===


def long_files(sources: Sources) -> dict[str, int]:
    """Return the lines of each file that has too many."""
    lines = {file: len(text.splitlines()) for file, text in sources.items()}
    return {file: number for file, number in lines.items() if number > FILE_LINES}


def functions(sources: Sources) -> Iterator[tuple[Spot, Function]]:
    """Yield each function."""
    return ((spot, spot.node) for spot in spots(sources) if isinstance(spot.node, FUNCTIONS))


def long_functions(sources: Sources) -> dict[str, int]:
    """Return the lines of each function that has too many."""
    lines = {
        spot.place: (node.end_lineno or 0) - node.lineno + 1 for spot, node in functions(sources)
    }
    return {place: number for place, number in lines.items() if number > FUNCTION_LINES}


def parameters(sources: Sources) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield the place and the type of each parameter but self, cls and what passes through."""
    for spot, node in functions(sources):
        named, is_method = node.args, spot.around and isinstance(spot.around[-1], ast.ClassDef)
        has_self = is_method and "staticmethod" not in map(ast.unparse, node.decorator_list)
        positional = [*named.posonlyargs, *named.args][1 if has_self else 0 :]
        yield from ((spot.place, one.annotation) for one in (*positional, *named.kwonlyargs))


def bare_any(sources: Sources) -> list[str]:
    """Return the place of each parameter whose type says nothing."""
    return [
        place
        for place, annotation in parameters(sources)
        if isinstance(annotation, ast.Name) and annotation.id == "Any"
    ]


def without_annotation(sources: Sources) -> list[str]:
    """Return the place of each parameter without a type."""
    return [place for place, annotation in parameters(sources) if annotation is None]


def imports_in_functions(sources: Sources) -> list[str]:
    """Return the place of each import that waits for a call."""
    return [
        spot.place
        for spot in spots(sources)
        if isinstance(spot.node, ast.Import | ast.ImportFrom) and spot.waits_for_a_call
    ]


def without_docstring(sources: Sources) -> list[str]:
    """Return the place of each module and public class, function and method that says nothing."""
    return [
        spot.place
        for spot in spots(sources)
        if isinstance(spot.node, (ast.Module, *DEFINITIONS))
        if not spot.waits_for_a_call and not any(name.startswith("_") for name in spot.names)
        if ast.get_docstring(spot.node) is None
    ]


RATCHETS = {
    "bare Any": bare_any,
    "imports in functions": imports_in_functions,
    "no docstring": without_docstring,
    "no annotation": without_annotation,
}
