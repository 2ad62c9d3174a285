"""Whole layers beside factors: the base's own, or trained ones, as PEFT applies them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megalora.hf.inspect import inspect_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import read_adapter, read_adapter_directory
from tests.support.hf_models import (
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    trained_by_peft,
)

MALFORMED = pytest.mark.bad_input("a malformed file")
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
PEFT = "base_model.model."
TOLERANCE = {"atol": 5e-6, "rtol": 0.0}

TRAINED = {
    "embeddings": ("llama", False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": ("llama", False, {"modules_to_save": ["norm", "input_layernorm"]}),
    "tied embeddings": ("llama", True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied embedding": ("llama", True, {"modules_to_save": ["embed_tokens"]}),
    "a tied unembedding": ("llama", True, {"modules_to_save": ["lm_head"]}),
    "all biases": ("qwen2", False, {"bias": "all"}),
    "biases beside factors": ("qwen2", True, {"bias": "lora_only"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_trained_layers_are_merged_as_peft_applies_them(case, tmp_path):
    family, tied, fields = TRAINED[case]
    model = hf_model(family, tied=tied)
    model.save_pretrained(str(tmp_path / "base"))
    config = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], **fields
    )
    expected = trained_by_peft(model, config, tmp_path / "a")
    adapter = read_adapter_directory(tmp_path / "a")
    trained = adapter.trained_layers(tmp_path / "base")
    assert (logits(merged(model, adapter.factors)) - expected).abs().max() > 1e-3
    merge_adapter(tmp_path / "base", adapter.factors, tmp_path / "out", trained=trained)
    torch.testing.assert_close(logits(hf_model_from(tmp_path / "out")), expected, **TOLERANCE)
    with pytest.raises(ValueError, match=r"not its base's: .*trained beside the factors: merge"):
        read_adapter(tmp_path / "a", base=tmp_path / "base")


# === Copies of the base ===


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, and an adapter of it with its unembedding, which PEFT saves along."""
    place = tmp_path_factory.mktemp("copies")
    model = hf_model("llama")
    model.save_pretrained(str(place / "base"))
    config = LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]
    )
    trained_by_peft(model, config, place / "a")
    return place


def changed(place: Path, directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a copy of the adapter with other tensors."""
    directory.mkdir()
    whole = {**load_file(place / "a" / "adapter_model.safetensors"), **tensors}
    save_file(whole, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = (place / "a" / "adapter_config.json").read_text()
    (directory / "adapter_config.json").write_text(text)
    return directory


def own(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "base" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_the_base_mean_nothing_in_whatever_precision(dtype, place, tmp_path):
    base = own(place)
    copies = {
        f"{PEFT}lm_head.base_layer.weight": base[UNEMBEDDING].to(dtype),
        f"{PEFT}{EMBEDDING}": base[EMBEDDING].to(dtype),
        f"{PEFT}model.norm.modules_to_save.weight": base["model.norm.weight"].to(dtype),
    }
    directory = changed(place, tmp_path / "a", copies)
    assert read_adapter_directory(directory).trained_layers(place / "base") == {}
    found, expected = (read_adapter(each, base=place / "base") for each in (directory, place / "a"))
    assert found.keys() == expected.keys() == {n for n in expected if "lora" not in n}
    assert all(torch.equal(m.lora_B, found[n].lora_B) for n, m in expected.items())


def test_a_copy_that_differs_is_applied_as_peft_does(place, tmp_path):
    other = own(place)[UNEMBEDDING] + 0.1
    directory = changed(place, tmp_path / "a", {f"{PEFT}lm_head.base_layer.weight": other})
    expected = logits(peft_model(hf_model("llama"), directory))
    adapter = read_adapter_directory(directory)
    trained = adapter.trained_layers(place / "base")
    merge_adapter(place / "base", adapter.factors, tmp_path / "out", trained=trained)
    torch.testing.assert_close(logits(hf_model_from(tmp_path / "out")), expected, **TOLERANCE)
    assert list(trained) == [UNEMBEDDING]


def test_copies_are_compared_with_a_tied_embedding(tmp_path):
    model = hf_model("llama", tied=True)
    model.save_pretrained(str(tmp_path / "base"))
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"])
    trained_by_peft(model, config, tmp_path / "a")
    assert UNEMBEDDING not in own(tmp_path)
    assert list(read_adapter(tmp_path / "a", base=tmp_path / "base")) == ["lm_head"]


def test_a_trained_layer_is_stored_in_the_precision_of_the_base(place, tmp_path):
    (tmp_path / "base").mkdir()
    half = {name: tensor.bfloat16() for name, tensor in own(place).items()}
    save_file(half, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    text = (place / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(text)
    norm = torch.full((32,), 3.0)
    merge_adapter(tmp_path / "base", {}, tmp_path / "out", trained={"model.norm.weight": norm})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], norm.bfloat16())
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


# === Without the base, and what does not fit it ===


def test_the_frozen_copy_is_taken_without_a_base_and_that_is_said(place):
    with pytest.warns(UserWarning, match=r"its base's lm_head\.weight, not compared"):
        assert "lm_head" in read_adapter(place / "a")


@MALFORMED
def test_what_may_have_been_trained_needs_the_base(place, tmp_path):
    directory = changed(place, tmp_path / "a", {f"{PEFT}{EMBEDDING}": own(place)[EMBEDDING]})
    message = rf"whole layers .*{EMBEDDING}: .*the embeddings were trained: only with the base"
    with pytest.raises(ValueError, match=message):
        read_adapter(directory)
    assert any("only with the base" in text for text in inspect_peft(directory).warnings)


@MALFORMED
def test_a_base_without_weights_cannot_be_compared(place, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match=r"compared with the base's: .*neither"):
        read_adapter(place / "a", base=tmp_path / "base")


@MALFORMED
def test_resized_embeddings_are_named(tmp_path):
    model = hf_model("llama")
    model.save_pretrained(str(tmp_path / "base"))
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(70)
    config = LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    trained_by_peft(larger, config, tmp_path / "a")
    with pytest.raises(ValueError, match=r"with 70 rows, its base has 66: .*resize_token_emb"):
        read_adapter(tmp_path / "a", base=tmp_path / "base")


WRONG = {
    "score.weight": (torch.ones(2, 32), r"score\.weight, which its base does not have"),
    "v_head.summary.bias": (torch.ones(1), r"bias, which its base does not have"),
    "model.norm.weight": (torch.ones(31), r"\[31\], its base \[32\]: it belongs to another"),
    EMBEDDING: (torch.ones(0), "without values: .*ZeRO-3"),
    "lm_head.base_layer.weight": (torch.full((66, 32), torch.nan), "NaN or infinite"),
    "model.layers.0.mlp.up_proj.base_layer.weight": (torch.ones(640, 1).byte(), "quantized"),
}


@MALFORMED
@pytest.mark.parametrize("name", WRONG)
def test_a_layer_that_no_base_could_take_is_refused_by_its_key(name, place, tmp_path):
    tensor, message = WRONG[name]
    directory = changed(place, tmp_path / "a", {PEFT + name: tensor})
    with pytest.raises(ValueError, match=message):
        read_adapter(directory, base=place / "base")


def test_merged_tied_embeddings_are_apart_and_that_is_returned(place, tmp_path):
    hf_model("llama", tied=True).save_pretrained(str(tmp_path / "base"))
    trained = {EMBEDDING: torch.ones(66, 32)}
    assert merge_adapter(tmp_path / "base", {}, tmp_path / "out", trained=trained)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[UNEMBEDDING], own(tmp_path)[EMBEDDING])
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
