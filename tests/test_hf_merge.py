"""Merging into Hugging Face directories: transformers' logits, the same files, bounded memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.hf.factors import LoRAFactors
from megalora.hf.inspect import inspect_peft, measure
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import write_adapter
from tests.support.hf_models import hf_model, hf_model_from, logits, merged, random_factors

RANKS = {"experts": (4, 0.5), "": (8, 2.0)}


def save(model: torch.nn.Module, directory: Path, **options: object) -> Path:
    model.save_pretrained(str(directory), **options)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3_moe"])
def test_the_merged_directory_has_the_logits_of_the_merged_model(family, tmp_path):
    model = hf_model(family)
    factors = random_factors(model, RANKS)
    base = save(model, tmp_path / "base", max_shard_size="20KB")
    assert not merge_adapter(base, factors, tmp_path / "out")
    found = logits(hf_model_from(tmp_path / "out"))
    assert (found - logits(model)).abs().max() > 0.05
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"megalora.json", *(p.name for p in base.iterdir())}
    index = "model.safetensors.index.json"
    assert (
        json.loads((base / index).read_text())["weight_map"]
        == json.loads((tmp_path / "out" / index).read_text())["weight_map"]
    )


def test_experts_stored_as_one_tensor_are_merged_as_well(tmp_path):
    model = hf_model("qwen3_moe")
    factors = random_factors(model, RANKS)
    base = save(model, tmp_path / "base")
    save_file(dict(model.state_dict()), base / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(base / "model.safetensors")
    merge_adapter(base, factors, tmp_path / "out")
    expected = merged(model, factors).state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}])
def test_an_adapter_of_a_tied_unembedding_unties_it(shards, tmp_path):
    model = hf_model("qwen3", tied=True)
    factors = random_factors(model, RANKS)
    base = save(model, tmp_path / "base", **shards)
    assert merge_adapter(base, factors, tmp_path / "out")
    found = hf_model_from(tmp_path / "out")
    assert not found.config.tie_word_embeddings
    table = model.model.embed_tokens.weight
    assert torch.equal(found.model.embed_tokens.weight, table), "the embedding stays as it is"
    torch.testing.assert_close(logits(found), logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


def test_a_tied_model_stays_tied_without_an_adapter_of_its_unembedding(tmp_path):
    model = hf_model("qwen3", tied=True)
    factors = random_factors(model, RANKS, lm_head=False)
    assert not merge_adapter(save(model, tmp_path / "base"), factors, tmp_path / "out")
    found = hf_model_from(tmp_path / "out")
    assert found.config.tie_word_embeddings
    torch.testing.assert_close(logits(found), logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


def test_sums_are_made_in_fp32_and_rounded_once(tmp_path):
    model = hf_model("qwen3").bfloat16()
    factors = random_factors(model, RANKS)
    merge_adapter(save(model, tmp_path / "base"), factors, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    weight = model.state_dict()[f"{name}.weight"].float()
    expected = (weight + factors[name].delta()).bfloat16()
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], expected
    )


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("model.layers.7.mlp.up_proj", (32, 40), "no weights for model.layers.7"),
        ("model.layers.0.mlp.up_proj", (32, 41), r"up_proj \[41, 32\] \(base \[40, 32\]\)"),
    ],
)
def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(
    name, sizes, message, tmp_path
):
    base = save(hf_model("qwen3"), tmp_path / "base")
    factors = {name: LoRAFactors(torch.ones(2, sizes[0]), torch.ones(sizes[1], 2), 1.0)}
    with pytest.raises(ValueError, match=message):
        merge_adapter(base, factors, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


NUMBERS = pytest.mark.bad_input("a number that is not one")
UP = "model.layers.0.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"


def write_base(directory: Path, name: str = "", value: float | torch.Tensor = 0.0) -> Path:
    """Save a tiny model in fp16 with one value of a weight, or one weight, replaced."""
    save(hf_model("qwen3").half(), directory)
    tensors = load_file(directory / "model.safetensors")
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    elif name:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def update(fill: float = 1.0, name: str = UP) -> dict[str, LoRAFactors]:
    return {name: LoRAFactors(torch.full((1, 32), fill), torch.full((40, 1), fill), 1.0)}


@NUMBERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{UP}.weight", NORM], ids=["adapted", "not adapted"])
def test_a_base_that_is_not_finite_is_refused_by_tensor_and_file(name, value, tmp_path):
    base = write_base(tmp_path / "base", name, value)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has NaN or infinite"):
        merge_adapter(base, update(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@NUMBERS
def test_a_sum_beyond_the_precision_of_the_base_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    merge_adapter(base, update(100.0), tmp_path / "in range")
    with pytest.raises(ValueError, match=rf"{UP}\.weight plus its update is beyond torch\.float16"):
        merge_adapter(base, update(300.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@NUMBERS
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
def test_codes_of_numbers_are_not_added_to(dtype, tmp_path):
    base = write_base(tmp_path / "base", f"{UP}.weight", torch.ones(40, 32).to(dtype))
    with pytest.raises(ValueError, match=rf"{UP}\.weight as \w+, codes of numbers.* unquantised"):
        merge_adapter(base, update(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norms_are_those_of_the_update_itself():
    module = LoRAFactors(torch.randn(3, 50), torch.randn(70, 3), 0.7)
    report = measure("x", module)
    assert report.norm_update == pytest.approx(module.delta().norm().item(), rel=1e-5)
    assert report.num_parameters == 3 * 120


@NUMBERS
def test_inspect_names_targets_and_what_is_wrong(tmp_path):
    model = hf_model("qwen3_moe")
    factors = random_factors(model, RANKS)
    factors["lm_head"].lora_B.zero_()
    write_adapter(tmp_path / "a", factors, base_model_name="some/base")
    path = tmp_path / "a" / "adapter_model.safetensors"
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    tensors = load_file(path)
    tensors[key][0, 0] = float("nan")
    save_file({**tensors, "stray": torch.ones(1)}, path, metadata={"format": "pt"})
    report = inspect_peft(tmp_path / "a")
    assert report.num_parameters == sum(m.num_parameters for m in factors.values())
    text = report.table()
    assert "some/base" in text
    assert "model.layers.*.mlp.experts.*.up_proj" in text
    for problem in ("stray", "B is zero, so nothing was learned, in lm_head", "NaN"):
        assert any(problem in warning for warning in report.warnings), problem
    assert any("layers.1.self_attn.k_proj" in warning for warning in report.warnings)
    assert json.dumps(report.to_dict())
