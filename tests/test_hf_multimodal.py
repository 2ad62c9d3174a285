"""Language models of which another family's row says all, beside what sees and stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.hf.cuts import Placement, Shard
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import write_adapter
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Weights
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_args
from tests.support.hf_models import (
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    random_factors,
)

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "mistral3")
RANKS = {"": (4, 2.0)}
SEES = ("visual", "vision_tower", "multi_modal_projector")


def base_of(family: str, place: Path, **options: bool) -> Path:
    hf_model(family, **options).save_pretrained(str(place))
    return place


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_leaves_what_sees_as_it_is(family: str, tied: bool, tmp_path: Path) -> None:
    model, base = hf_model(family, tied=tied), base_of(family, tmp_path / "base", tied=tied)
    factors = random_factors(model, RANKS)
    assert merge_adapter(base, factors, tmp_path / "out") is tied
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "out"))
    beside = [name for name in before if any(part in name for part in SEES)]
    assert beside
    assert all(torch.equal(before[name], after[name]) for name in beside)
    found = hf_model_from(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_nothing_that_sees(family: str, tmp_path: Path) -> None:
    model = hf_model(family)
    factors = random_factors(model, RANKS)
    write_adapter(
        tmp_path / "a", factors, base_model_name="b", names=names_of(family), num_layers=2
    )
    loaded = peft_model(model, tmp_path / "a")
    adapted = [name for name, _ in loaded.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == len(factors)
    torch.testing.assert_close(logits(loaded), logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


def older(base: Path) -> dict[str, Any]:
    """Name all as the published Qwen2.5-VL does; return what its config.json says."""
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    old = {**text, **config}
    (base / "config.json").write_text(json.dumps(old))
    return old


def test_files_and_config_of_before_transformers_5_are_the_same_model(tmp_path: Path) -> None:
    base = base_of("qwen2_5_vl", tmp_path / "base")
    new, first = read_config(base), HFWeights(base, names_of("qwen2_5_vl"))
    tables = {name: first.read(name, 0, rows) for name, (rows, *_) in first.shapes.items()}
    old = older(base)
    assert megatron_args(read_config(base)) == megatron_args(new)
    assert model_shape(old) == model_shape(new)
    files = HFWeights(base, names_of("qwen2_5_vl"))
    expected = Weights(old, Placement(Shard(), Shard(), Shard())).expected()
    files.check(expected, tied=False)
    for name, (rows, *_) in expected.items():
        assert torch.equal(files.read(name, 0, rows), tables[name]), name


def test_a_copy_of_a_tied_table_under_its_older_name_is_untied_once(tmp_path: Path) -> None:
    model, base = hf_model("mistral3", tied=True), base_of("mistral3", tmp_path / "b", tied=True)
    tensors = load_file(base / "model.safetensors")
    older = {
        name.replace("model.language_model.", "language_model.model.").removeprefix("model."): own
        for name, own in tensors.items()
    }
    older["language_model.lm_head.weight"] = older["language_model.model.embed_tokens.weight"] + 0
    save_file(older, base / "model.safetensors", {"format": "pt"})
    factors = random_factors(model, RANKS)
    assert merge_adapter(base, factors, tmp_path / "out")
    heads = [name for name in load_file(tmp_path / "out/model.safetensors") if "lm_head" in name]
    assert heads == ["lm_head.weight"]
    found = logits(hf_model_from(tmp_path / "out"))
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


@pytest.mark.bad_input("a number that is not one")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.1}},
            "rope_type is 'yarn' .*supported are 'default' and 'llama3'",
        ),
        ({"model_type": "ministral3"}, "text_config has model_type 'ministral3': .* with mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3 .its tensors 2"),
    ],
    ids=range(4),
)
def test_what_the_language_model_has_otherwise_is_refused(
    changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    base = base_of("mistral3", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= changes
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        megatron_args(read_config(base))
