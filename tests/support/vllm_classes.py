"""What vLLM's model classes declare for LoRA, by the source of their files alone."""

import ast
from collections.abc import Iterator
from functools import cache
from typing import Any

import regex

from tests.support.server_stubs import SERVERS

FOLDER = "vllm-0.33.0"
MODELS = SERVERS / FOLDER / "vllm" / "model_executor" / "models"
_DECLARED = (
    *("embedding_modules", "packed_modules_mapping", "is_3d_moe_weight", "is_non_gated_moe"),
    *("lora_skip_prefixes", "hf_to_vllm_mapper"),
)


@cache
def _classes() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(path.read_text()) for path in MODELS.rglob("*.py")]
    return {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}


def _assigned(cls: ast.ClassDef) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
            found[node.target.id] = node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def bases_of(name: str) -> Iterator[str]:
    """Yield a class of vLLM's models and what it derives from, nearest first."""
    yield name
    cls = _classes().get(name)
    for base in cls.bases if cls else ():
        yield from bases_of(ast.unparse(base).rpartition(".")[2])


def declaration(name: str, attribute: str) -> ast.expr | None:
    """Return what a class, or the nearest base of it, assigns to an attribute."""
    for base in bases_of(name):
        cls = _classes().get(base)
        if cls and attribute in (found := _assigned(cls)):
            return found[attribute]
    return None


@cache
def registered() -> dict[str, str]:
    """Return vLLM's classes by the architecture of config.json."""
    found: dict[str, str] = {}
    for node in ast.parse((MODELS / "registry.py").read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    found[str(key.value)] = ast.literal_eval(value)[1]
    return found


class _Scope(dict[str, Any]):
    """Names in a class's body: of other classes, what they declare."""

    def __missing__(self, name: str) -> Any:
        if name not in _classes():
            raise KeyError(name)
        mapper = self["WeightsMapper"]

        class Other:
            def __getattr__(self, attribute: str) -> Any:
                value = declaration(name, attribute)
                assert value is not None, (name, attribute)
                return _evaluated(value, mapper)

        return Other()


def _evaluated(value: ast.expr, mapper: type) -> Any:
    scope = _Scope({"WeightsMapper": mapper, "re": regex})
    return eval(compile(ast.Expression(value), "declared", "eval"), {}, scope)


def declared(architecture: str, mapper: type) -> dict[str, Any]:
    """Return what vLLM's class for an architecture declares for LoRA, evaluated."""
    name = registered()[architecture]
    found: dict[str, Any] = {"is_3d_moe_weight": False, "is_non_gated_moe": False}
    for attribute in _DECLARED:
        value = declaration(name, attribute)
        while isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            value = declaration(value.value.id, value.attr)
        if value is not None:
            found[attribute] = _evaluated(value, mapper)
    if takes_unembedding(name):
        found["embedding_modules"] = {"embed_tokens": "", "lm_head": ""}
    # Qwen3-MoE adds it in its __init__, which does not run here.
    found.setdefault("packed_modules_mapping", {}).setdefault(
        "gate_up_proj", ["gate_proj", "up_proj"]
    )
    return found


def takes_unembedding(name: str) -> bool:
    """Say whether a class, or the language model that it holds, declares modules of embeddings."""
    value = declaration(name, "embedding_modules")
    own = value is not None and bool(ast.literal_eval(value))
    return own or any(takes_unembedding(held) for held in _language_models(name))


def _language_models(name: str) -> set[str]:
    """Return the classes that a multimodal one calls for its `language_model`."""
    nodes = (
        node for base in bases_of(name) if base in _classes() for node in ast.walk(_classes()[base])
    )
    calls = (
        node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    return {
        ast.unparse(call.value.func)
        for call in calls
        if ast.unparse(call.targets[0]) == "self.language_model"
        and isinstance(call.value, ast.Call)
    }
