"""A family is one row: what it says is what every part goes by, and no other place names it."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.cuts import Piece, Placement, Shard
from megalora.hf.linears import linears
from megalora.hf.run_flags import targets_of
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Weights
from megalora.model import families
from megalora.model.config_json import mapped_family, model_shape
from megalora.model.megatron import megatron_flags
from megalora.recommend import learning_rates, recommend
from megalora.training.auto_lr import add_auto_lr_args
from tests.support.sizes import TINY_GLM, TINY_MOE

PACKAGE = Path(families.__file__).parents[2]
TOY = """
from megalora.model.decoder_names import DECODER
from megalora.model.family import LLAMA_LIKE, Experts, Family, Names, Rate

MODULES = {
    **DECODER,
    "self_attention.linear_qkv": ("attn.q", "attn.k", "attn.v"),
    "mlp.router": ("moe.router",),
    "mlp.experts.linear_fc1": ("moe.{}.w1", "moe.{}.w3"),
    "mlp.experts.linear_fc2": ("moe.{}.w2",),
}

FAMILIES = (
    Family(
        model_type="toy",
        architecture="ToyForCausalLM",
        rate=Rate("toys", 0.5),
        names=Names(
            layer="blocks.{}.",
            unembedding="head",
            modules=MODULES,
            stacked={"moe.w13": "mlp.experts.linear_fc1"},
        ),
        megatron={**LLAMA_LIKE, "normalization": "LayerNorm"},
        qkv_bias=True,
        experts=Experts(count=("n_experts",)),
        refused={"soft_cap": None},
    ),
)
"""
CONFIG = {**TINY_MOE, "model_type": "toy", "n_experts": 4, "mlp_only_layers": []}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one file into the folder of families, as a newcomer would."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setitem(families.FAMILIES, "toy", families.find_families()["toy"])


@pytest.mark.usefixtures("toy")
def test_one_file_gives_sizes_and_flags() -> None:
    shape = model_shape(CONFIG)
    assert (shape.num_moe_experts, shape.add_qkv_bias, shape.unmapped) == (4, True, "")
    flags = " ".join(megatron_flags(CONFIG))
    for part in ("--normalization LayerNorm", "--add-qkv-bias", "--num-experts 4"):
        assert part in flags
    with pytest.raises(ValueError, match=r"soft_cap is 30\.0, toy is supported with None only"):
        mapped_family({**CONFIG, "soft_cap": 30.0})


@pytest.mark.usefixtures("toy")
def test_one_file_gives_the_mapping_of_weights() -> None:
    weights = Weights(CONFIG, Placement(Shard(), Shard(), Shard(1, 2)))
    [down] = weights.pieces("decoder.layers.0.mlp.experts.linear_fc2.weight1", 1, 32)
    assert down == Piece("blocks.1.moe.3.w2.weight", 0, 32, 0, (0, 24))
    expected = weights.expected()
    assert expected["blocks.1.attn.q.bias"] == (32,)
    assert expected["blocks.1.moe.3.w3.weight"] == (24, 32)
    assert expected["head.weight"] == (80, 32)


@pytest.mark.parametrize(
    ("model_type", "stacked", "one"),
    [
        ("toy", "blocks.1.moe.w13", "blocks.1.moe.2.w3.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.gate_up_proj", "mlp.experts.2.up_proj.weight"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_one_file_says_how_a_layers_experts_are_stacked(
    model_type: str, stacked: str, one: str, tmp_path: Path
) -> None:
    whole = torch.randn(4, 2 * 24, 32)
    save_file({stacked: whole}, tmp_path / "model.safetensors")
    files = HFWeights(tmp_path, families.names_of(model_type))
    assert len(files.shapes) == 4 * 2
    [name] = [name for name in files.shapes if name.endswith(one)]
    assert files.shapes[name] == (24, 32)
    assert torch.equal(files.read(name, 5, 3), whole[2, 24 + 5 : 24 + 8])
    assert torch.equal(files.read(name, 5, 3, (8, 16)), whole[2, 24 + 5 : 24 + 8, 8:16])


@pytest.mark.usefixtures("toy")
def test_one_file_gives_the_names_of_adapters() -> None:
    config, shape = LoRAConfig(rank=4), model_shape(CONFIG)
    tensors = {
        "decoder.layers.1.mlp.experts.linear_fc2_lora.lora_A": torch.randn(4, 2, 24),
        "decoder.layers.1.mlp.experts.linear_fc2_lora.lora_B": torch.randn(4, 32, 2),
        "output_layer_lora.lora_A": torch.randn(4, 32),
        "output_layer_lora.lora_B": torch.randn(80, 4),
    }
    factors = to_hf(tensors, config, shape)
    assert factors.keys() == {*(f"blocks.1.moe.{e}.w2" for e in range(4)), "head"}
    back = from_hf(factors, config, shape)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.usefixtures("toy")
def test_one_file_gives_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    result = recommend(model_shape(CONFIG), LoRAConfig(rank=4))
    assert result.learning_rate == pytest.approx(5e-4 * (2000 / 32) ** 0.5)
    assert learning_rates(32, "toys").known
    monkeypatch.setattr("sys.argv", ["script", "--lora-family", "toys"])
    parser = argparse.ArgumentParser()
    add_auto_lr_args(parser)
    assert parser.parse_args().lora_family == "toys"


def family_names() -> re.Pattern[str]:
    rows = families.FAMILIES.values()
    names = {re.sub(r"\d.*", "", name) for row in rows for name in (row.model_type, row.rate.name)}
    return re.compile("|".join(sorted(names | {"deepseek", "gemma", "gpt_oss", "nemotron"})))


def strings(tree: ast.AST) -> Iterator[str]:
    """Yield the string literals of a source, without docstrings."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        body = node.body[1:] if isinstance(node, described) and ast.get_docstring(node) else None
        if body is not None:
            node.body = body
    # Once docstrings are gone, the rest of the strings are literals.
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def named(source: str) -> list[str]:
    pattern = family_names()
    return [text for text in strings(ast.parse(source)) if pattern.search(text.lower())]


def test_no_other_package_names_a_family() -> None:
    sources = [path for path in PACKAGE.rglob("*.py") if path.parts[len(PACKAGE.parts)] != "model"]
    assert len(sources) > 50
    found = {path.name: names for path in sources if (names := named(path.read_text()))}
    assert not found, f"ask megalora.model instead of naming a family: {found}"


@pytest.mark.parametrize(
    "compared", ['x == "qwen3_moe"', 'f"{y} of Llama-3"', '{"deepseek_v3": 1}']
)
def test_a_family_that_is_named_is_found(compared: str) -> None:
    assert named(f'def f(x):\n    """Say llama."""\n    return {compared}\n')
    assert not named('def f(x):\n    """Say llama."""\n    return x\n')


def test_the_flags_of_an_import_name_each_linear_once() -> None:
    # It has MLPs, experts and shared experts, each with a linear_fc1.
    shape = model_shape({**TINY_GLM, "n_shared_experts": 1})
    names = families.names_of("glm4_moe")
    places = {
        (layer, linear)
        for linear in linears(names).values()
        for layer in range(shape.num_layers)
        if linear.megatron.startswith("mlp.linear") or linear.is_shared or linear.is_expert
        if linear.fits(layer, shape)
    }
    assert targets_of(places, shape) == ("linear_fc1", "linear_fc2")
    [first, *others] = sorted(places, key=lambda place: place[1].megatron)
    assert first[1].name(first[0]) not in (found := targets_of(others, shape)), found
    assert len(set(found)) == len(found)


def test_the_document_has_each_family_and_its_file() -> None:
    text = (PACKAGE.parent / "docs" / "families.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \|.*\| `(\w+\.py)` \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == families.FAMILIES.keys()
    folder = Path(families.__file__).parent
    for name, file in rows:
        assert f'"{name}"' in (folder / file).read_text(), (name, file)
