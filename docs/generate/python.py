"""The page of the Python interface, from the source: signatures and docstrings as they stand."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import megalora
from docs.generate.markdown import directive, paragraphs, prose, sentence
from megalora.config import field_texts

ROOT = Path(__file__).parents[2]

type Definition = ast.ClassDef | ast.FunctionDef | ast.AnnAssign


class Section(NamedTuple):
    """A heading, what stands below it, and the public names of modules there."""

    title: str
    about: str
    names: dict[str, tuple[str, ...]]


def _public(module: str) -> tuple[str, ...]:
    """Return the names in a module's `__all__`."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def sections() -> tuple[Section, ...]:
    """Return what is on the page, in order."""
    return (
        Section(
            "The plugin",
            "What `import megalora` gives; it imports neither Megatron nor torch before they are "
            "needed.",
            {"megalora": tuple(megalora.__all__)},
        ),
        Section(
            "In a launch script",
            "What `examples/pretrain_lora.py` calls between parsing flags and `pretrain`.",
            {"megalora.launch": _public("megalora.launch")},
        ),
        Section(
            "Data",
            "Chats and texts with loss masks, packed; [what a row may be](../data.md).",
            {
                "megalora.data": _public("megalora.data"),
                "megalora.data.batch": ("datasets_provider", "forward_step", "loss_func"),
            },
        ),
        Section(
            "Hugging Face",
            "Adapters and bases of a model that is running; the [commands](commands.md) do the "
            "same without one. All ranks must call them.",
            {
                "megalora.hf.exchange": ("load_adapter", "export_adapter"),
                "megalora.hf.base": ("load_hf_base",),
                "megalora.hf.base_out": ("save_hf_base",),
            },
        ),
        Section(
            "Losses",
            "Of reinforcement learning and of preferences.",
            {
                "megalora.losses": (
                    "vocab_parallel_logprobs",
                    "sequence_logprobs",
                    "group_advantages",
                    "policy_gradient_loss",
                    "num_clipped",
                    "kl_loss",
                    "dpo_loss",
                    "dpo_metrics",
                    "check_dpo",
                )
            },
        ),
        Section(
            "Policies",
            "Training by any loss of whole answers' log probabilities, in every layout.",
            {
                "megalora.policy.policy": ("Policy", "Step", "HasSequences"),
                "megalora.policy.sequences": ("Sequences",),
            },
        ),
        Section(
            "Rollouts",
            "Answers sampled from a policy in training. An engine is a class with the methods of "
            "`Engine`.",
            {
                "megalora.rollouts.engine": ("Engine", "Sampling", "Answer"),
                "megalora.rollouts.megatron": ("MegatronEngine",),
                "megalora.rollouts.vllm": ("VLLMEngine",),
                "megalora.rollouts.sglang": ("SGLangEngine",),
                "megalora.rollouts.gap": ("gap", "Gap"),
            },
        ),
        Section(
            "Handing adapters to a server",
            "Gathered layer by layer, without the base.",
            {
                "megalora.sync.tensors": ("RunningAdapters",),
                "megalora.sync.plan": ("Plan",),
                "megalora.sync.versions": ("VersionedDirectory",),
                "megalora.sync.http": ("Http",),
                "megalora.sync.vllm": ("VLLMClient",),
                "megalora.sync.sglang": ("SGLangClient",),
            },
        ),
        Section(
            "Kinds of adapters and their ops",
            "Where a kind of adapter, or another set of ops, comes in.",
            {
                "megalora.adapters.kinds": ("Kind", "LoRA", "kind_named"),
                "megalora.ops": ("backend",),
            },
        ),
        Section(
            "Recommendations",
            "What `megalora recommend` prints.",
            {
                "megalora.recommend": tuple(
                    name for name in _public("megalora.recommend") if name != "add_parser"
                )
            },
        ),
    )


def page() -> str:
    """Return the page."""
    parts = [
        "# Python",
        "Signatures and docstrings as they stand in the source. Shapes are in brackets: "
        "s is the sequence, b the microbatch, h the hidden size, v the vocabulary, r the rank of "
        "adapters; `/tp` and the like mean this rank's part of it. A `ValueError` says what a user "
        "can change. Whatever begins with an underscore, or is not here, may change.",
    ]
    for section in sections():
        parts += [f"## {section.title}", section.about]
        for module, names in section.names.items():
            parts += [described(module, name) for name in names]
    return "\n\n".join(parts) + "\n"


def described(module: str, name: str) -> str:
    """Describe a function or class under the name that users import it by."""
    home, node = definition(module, name)
    public = f"{module}.{name}"
    source = f"[Source](../../{home.relative_to(ROOT).as_posix()})"
    if isinstance(node, ast.ClassDef):
        members = [_member(public, each) for each in _public_members(node)]
        fields = _fields(public, node)
        text = _docstring(node, without_fields=bool(fields) and name == "LoRAConfig")
        body = [text, *fields, *members, source]
        return directive("py:class", _class_signature(public, node), *body, level=1)
    if isinstance(node, ast.FunctionDef):
        return directive("py:function", public + _signature(node), _docstring(node), source)
    return directive("py:data", public, ast.unparse(node.value) if node.value else "", source)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def path_of(module: str) -> Path:
    """Return the file of a module."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(module: str, name: str) -> tuple[Path, Definition]:
    """Return where a name of a module is defined, and how, through what imports it."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return definition(str(node.module), name)
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return path_of(module), node
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return path_of(module), node
    raise AssertionError(f"{module} has no {name}")


def _docstring(node: ast.ClassDef | ast.FunctionDef, *, without_fields: bool = False) -> str:
    text = ast.get_docstring(node) or ""
    text = text.split("\n\n")[0] if without_fields else text
    return linked(paragraphs(text, _parameter_names(node)), node.name)


def _parameter_names(node: ast.AST) -> list[str]:
    """Return the names of a function's parameters, or of a class's fields and those of its call."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        extra = [each for each in (given.vararg, given.kwarg) if each]
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *extra]
        return [each.arg for each in every if each.arg not in ("self", "cls")]
    assert isinstance(node, ast.ClassDef)
    fields = [ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
    calls = [each for each in node.body if getattr(each, "name", "") == "__init__"]
    set_later = re.findall(r"self\.([a-z]\w*)(?:: \w+)?(?:,| =)", ast.unparse(node))
    return [*fields, *(name for call in calls for name in _parameter_names(call)), *set_later]


def linked(text: str, own: str = "") -> str:
    """Return Markdown in which `code` that names something on the page leads there.

    own: the name of what the text is about, which stays as it is.
    """

    def link(found: re.Match[str]) -> str:
        code = found[1]
        target = public_names().get(code.removeprefix("megalora."))
        return found[0] if target is None or code == own else f"{{py:obj}}`{code} <{target}>`"

    return re.sub(r"(?<!\})`([\w.]+)`", link, text)


@cache
def public_names() -> dict[str, str]:
    """Return the full name of everything on the page by each shorter name that means it alone."""
    found: dict[str, set[str]] = {}
    for section in sections():
        for module, names in section.names.items():
            for name in names:
                # A method's name alone says too little.
                for full, least in ((f"{module}.{name}", 1), *_member_names(module, name)):
                    parts = full.split(".")
                    for first in range(1, len(parts) - least + 1):
                        found.setdefault(".".join(parts[first:]), set()).add(full)
    return {short: min(full) for short, full in found.items() if len(full) == 1}


def _member_names(module: str, name: str) -> list[tuple[str, int]]:
    node = definition(module, name)[1]
    members = _public_members(node) if isinstance(node, ast.ClassDef) else ()
    return [(f"{module}.{name}.{each.name}", 2) for each in members if each.name != "__init__"]


def _public_members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            has_words = member.name == "__init__" and ast.get_docstring(member)
            if has_words or not member.name.startswith("_"):
                yield member


def _member(public: str, node: ast.FunctionDef) -> str:
    marks = [ast.unparse(decorator) for decorator in node.decorator_list]
    text = _docstring(node)
    if node.name == "__init__":
        return text
    name = f"{public}.{node.name}"
    if "property" in marks:
        kind = ast.unparse(node.returns) if node.returns else ""
        return directive("py:property", name, text, options=f":type: {kind}")
    options = ":classmethod:" if "classmethod" in marks else ""
    return directive("py:method", name + _signature(node, is_method=True), text, options=options)


def _fields(public: str, node: ast.ClassDef) -> list[str]:
    """Describe the fields of LoRAConfig, which have texts of their own."""
    if node.name != "LoRAConfig":
        return []
    texts = field_texts()
    return [
        directive(
            "py:attribute",
            f"{public}.{name}",
            prose(sentence(texts[name])),
            options=_annotation(field),
        )
        for field in node.body
        if isinstance(field, ast.AnnAssign) and (name := ast.unparse(field.target)) in texts
    ]


def _annotation(field: ast.AnnAssign) -> str:
    value = f"\n:value: {ast.unparse(field.value)}" if field.value else ""
    return f":type: {ast.unparse(field.annotation)}{value}"


def _signature(node: ast.FunctionDef, *, is_method: bool = False) -> str:
    """Return type parameters, parameters and what is returned, without self."""
    text = ast.unparse(node.args)
    is_static = any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list)
    if is_method and not is_static:
        text = re.sub(r"^(self|cls)(, )?", "", text)
    kinds = f"[{', '.join(map(ast.unparse, node.type_params))}]" if node.type_params else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kinds}({text}){returns}"


def _class_signature(public: str, node: ast.ClassDef) -> str:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return public + _signature(member, is_method=True).removesuffix(" -> None")
    if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        keywords = any("kw_only=True" in ast.unparse(mark) for mark in node.decorator_list)
        return f"{public}({', '.join([*(['*'] if keywords else []), *_parameters(node)])})"
    return public


def _parameters(node: ast.ClassDef) -> Iterator[str]:
    """Return the fields of a dataclass as its parameters."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            text = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}"
            default = ast.unparse(field.value) if field.value else ""
            if default.startswith("field("):
                found = re.search(r"default(?:_factory)?=([^,)]+)", default)
                default = found[1] if found else ""
            yield f"{text} = {default}" if default else text
