"""Keys of adapters as PEFT, wrappers and other savers leave them: read as PEFT's, or refused."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from megalora.hf.factors import LoRAFactors
from megalora.hf.inspect import inspect_peft
from megalora.hf.peft import read_adapter
from tests.support.hf_models import hf_model, logits, merged, peft_model, trained_by_peft

MALFORMED = pytest.mark.bad_input("a malformed file")
# Different ranks, by patterns that match whole names too.
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"^model.layers.1.mlp.down_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return hf_model("llama")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """An adapter that PEFT trained and saved, which has its logits."""
    directory = tmp_path_factory.mktemp("saved") / "a"
    expected = trained_by_peft(model, LoraConfig(**CONFIG), directory)
    ours = logits(merged(model, read_adapter(directory)))
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)
    return directory


def renamed(
    saved: Path, place: Path, rename: Callable[[str], str | None], **fields: object
) -> Path:
    """Write a copy of an adapter with other keys, None leaving one out, and other fields."""
    place.mkdir()
    tensors = load_file(saved / "adapter_model.safetensors")
    new = {name: tensor for key, tensor in tensors.items() if (name := rename(key))}
    save_file(new, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return place


def with_tensors(saved: Path, place: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a copy of an adapter with these tensors too, or in place of its own."""
    place.mkdir()
    whole = {**load_file(saved / "adapter_model.safetensors"), **tensors}
    save_file(whole, place / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(saved / "adapter_config.json", place)
    return place


def read_quietly(directory: Path) -> tuple[dict[str, LoRAFactors], list[str]]:
    """Read an adapter; return its factors and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return read_adapter(directory), [str(warning.message) for warning in caught]


def same(first: dict[str, LoRAFactors], second: dict[str, LoRAFactors]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(m.lora_A, second[n].lora_A)
        and torch.equal(m.lora_B, second[n].lora_B)
        and m.scale == second[n].scale
        for n, m in first.items()
    )


INSIDE = "base_model.model."
LAYERS = f"{INSIDE}model.layers."
FORMS = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile of the base": lambda key: key.replace(INSIDE, f"{INSIDE}_orig_mod."),
    "torch.compile of each layer": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "DDP of the base": lambda key: key.replace(INSIDE, f"{INSIDE}module."),
    "FSDP": lambda key: "_fsdp_wrapped_module." + key.replace(
        "layers.0.", "layers.0._fsdp_wrapped_module."
    ),
    "recomputation": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "Lightning": lambda key: f"_forward_module.{key}",
    "wrappers of wrappers": lambda key: f"module._orig_mod.{key}",
    "a value head": lambda key: f"pretrained_model.{key}",
    "an adapter of an adapter": lambda key: INSIDE + key,
    "no prefix of PEFT": lambda key: key.removeprefix(INSIDE),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "a whole state_dict": lambda key: "module." + key.replace(".weight", ".default.weight"),
    "AutoModel": lambda key: key.replace(LAYERS, f"{INSIDE}layers."),
    "multimodal": lambda key: key.replace(LAYERS, f"{INSIDE}model.language_model.layers."),
    "multimodal before transformers 4.52": lambda key: key.replace(
        LAYERS, f"{INSIDE}language_model.model.layers."
    ),
    "multimodal of all kinds": lambda key: key.replace(LAYERS, f"{INSIDE}thinker.model.layers."),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_same_adapter_is_read_under_other_keys_and_that_is_said(form, saved, tmp_path):
    # Where the layers have another prefix, PEFT matched the patterns with that.
    patterns = {"rank_pattern": {r"layers.1.mlp.down_proj": 2}}
    found, said = read_quietly(renamed(saved, tmp_path / "a", FORMS[form], **patterns))
    assert same(found, read_adapter(saved))
    assert len(said) == 1
    assert f"read as {Q_PROJ.split('model.layers')[0]}" in said[0]


def test_the_keys_of_peft_are_read_without_a_word(saved):
    assert read_quietly(saved)[1] == []


def test_a_pattern_is_matched_with_the_name_that_peft_matched(saved, tmp_path):
    fields = {
        "rank_pattern": {"^model.language_model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"language_model.layers.0.self_attn.q_proj": 3},
    }
    directory = renamed(saved, tmp_path / "a", FORMS["multimodal"], **fields)
    assert same(read_quietly(directory)[0], read_adapter(saved))
    # The same patterns mean nothing to a model that has no such names.
    with pytest.raises(ValueError, match=r"down_proj \(2\)"):
        read_adapter(renamed(saved, tmp_path / "b", str, **fields))


@MALFORMED
def test_several_adapters_in_one_file_are_named(saved, tmp_path):
    def rename(key: str) -> str:
        return key.replace(".weight", f".{'first' if 'layers.0' in key else 'second'}.weight")

    with pytest.raises(ValueError, match=r"several adapters, by name: first \(.*second \("):
        read_adapter(renamed(saved, tmp_path / "a", rename))


@MALFORMED
def test_several_prefixes_are_named(saved, tmp_path):
    def rename(key: str) -> str:
        return FORMS["multimodal"](key) if "layers.0" in key else key

    with pytest.raises(ValueError, match=r"several prefixes: .*language_model"):
        read_adapter(renamed(saved, tmp_path / "a", rename))


@MALFORMED
def test_one_tensor_under_two_keys_is_refused(saved, tmp_path):
    directory = with_tensors(saved, tmp_path / "a", {f"_orig_mod.{Q_PROJ}": torch.ones(4, 32)})
    with pytest.raises(ValueError, match=rf"under two keys, .*{Q_PROJ}"):
        read_adapter(directory)


def test_states_of_training_are_left_out(saved, tmp_path):
    extra = {
        "base_model.model.model.rotary_emb.inv_freq": torch.ones(4),
        "base_model.model.lm_head.original_module.weight": torch.ones(4, 4),
        Q_PROJ.replace("lora_A.weight", "lora_velora_embed"): torch.ones(4),
    }
    assert same(read_adapter(with_tensors(saved, tmp_path / "a", extra)), read_adapter(saved))


STRANGE = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_A": "adapter of an embedding",
    "token_adapter.trainable_tokens_delta": "trained tokens",
    "lora_B.bias": "bias of lora_B",
    "lora_diag": "KaSA",
    "lora_E": "AdaLoRA",
    "hada_w1_a": "LoHa",
    "ia3_l": "IA3",
    "lora_down.weight": "kohya-ss",
    "alpha": "kohya-ss",
    "lora_a": "MLX",
    "lora_a.weight": "torchtune",
    "adapter.linear_in.weight": "Megatron-Bridge",
    "base_layer.weight.absmax": "quantized",
    "base_layer.weight.quant_state.bitsandbytes__nf4": "quantized",
}


@MALFORMED
@pytest.mark.parametrize("end", STRANGE)
def test_the_tensor_of_another_kind_of_adapter_is_refused_with_its_kind(end, saved, tmp_path):
    key = Q_PROJ.replace("lora_A.weight", end)
    directory = with_tensors(saved, tmp_path / "a", {key: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=rf"no LoRA factors: {key}: {key} is .*{STRANGE[end]}.*: "):
        read_adapter(directory)


@MALFORMED
@pytest.mark.parametrize("shape", [(0,), (0, 32), (64,)], ids=str)
def test_what_one_rank_had_of_a_factor_is_named_as_that(shape, saved, tmp_path):
    directory = with_tensors(saved, tmp_path / "a", {Q_PROJ: torch.ones(shape)})
    with pytest.raises(ValueError, match=r"q_proj\.lora_A \[.*ZeRO-3.*zero_to_fp32\.py"):
        read_adapter(directory)


LEFT_OUT = {
    "a list": {"target_modules": ["q_proj"]},
    "a pattern": {"target_modules": r".*\.q_proj"},
    "an end that is none": {"target_modules": ["q_proj", "own_proj"]},
    "excluded": {"exclude_modules": ["down_proj"]},
    "excluded by a pattern": {"exclude_modules": ".*mlp.*"},
    "other layers": {"layers_to_transform": [0]},
    "another layer": {"layers_to_transform": 0},
}


@MALFORMED
@pytest.mark.parametrize("case", LEFT_OUT)
def test_factors_that_peft_would_leave_out_are_refused(case, model, saved, tmp_path):
    directory = renamed(saved, tmp_path / "a", str, **LEFT_OUT[case])
    with pytest.raises(AssertionError, match=r"layers\.\d\.(mlp|self_attn)"):
        peft_model(model, directory)
    message = f"adapter_config {next(iter(LEFT_OUT[case]))} leaves out model.layers."
    with pytest.raises(ValueError, match=message):
        read_adapter(directory)
    assert any(message in text for text in inspect_peft(directory).warnings)


SELECTED = {
    "whole names": [
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)),
        *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)),
    ],
    "names of a wrapped model": ["self_attn._orig_mod.q_proj", "down_proj"],
    "more than there are": ["q_proj", "k_proj", "down_proj", "lm_head"],
    "all": "all-linear",
    "Unsloth": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    "none": None,
    "look-ahead": r"(?!vision).*\.(q_proj|down_proj)",
}  # fmt: skip


@pytest.mark.parametrize("case", SELECTED)
def test_target_modules_of_every_form_are_read(case, saved, tmp_path):
    directory = renamed(saved, tmp_path / "a", str, target_modules=SELECTED[case])
    assert same(read_adapter(directory), read_adapter(saved))


# === As PEFT leaves them behind ===


def _of_auto_model(model: torch.nn.Module, directory: Path) -> torch.Tensor:
    whole = copy.deepcopy(model)
    fields = {"rank_pattern": {"^layers.1.self_attn.q_proj": 2}}
    whole.model = get_peft_model(whole.model, LoraConfig(**START, **fields))
    whole.model.save_pretrained(str(directory))
    return logits(whole.eval())


def _of_compiled_model(model: torch.nn.Module, directory: Path) -> torch.Tensor:
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    adapted = get_peft_model(compiled, LoraConfig(**START))
    adapted.save_pretrained(str(directory))
    # Compiling takes seconds, and what is in there computes the same.
    return logits(adapted.get_base_model()._orig_mod.eval())


def _of_state_dict(model: torch.nn.Module, directory: Path) -> torch.Tensor:
    config = LoraConfig(**START)
    adapted = get_peft_model(copy.deepcopy(model), config)
    config.save_pretrained(str(directory))
    tensors = {f"module.{name}": tensor for name, tensor in adapted.state_dict().items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return logits(adapted.eval())


def _of_pissa(model: torch.nn.Module, directory: Path) -> torch.Tensor:
    """Train from principal components, and make plain LoRA of that, as a refusal advises."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    adapted = get_peft_model(copy.deepcopy(model), config)
    config.init_lora_weights = True
    adapted.save_pretrained(str(directory / "start"))
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_" in name:
                param.mul_(1.1)
    expected = logits(adapted.eval())
    start = {"path_initial_model_for_weight_conversion": str(directory / "start")}
    adapted.save_pretrained(str(directory), **start)
    return expected


START = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
LEFT = {
    "AutoModel": _of_auto_model,
    "torch.compile": _of_compiled_model,
    "a state_dict": _of_state_dict,
    "PiSSA": _of_pissa,
}


@pytest.mark.parametrize("case", LEFT)
def test_what_peft_leaves_behind_has_its_logits_here(case, model, tmp_path):
    model.save_pretrained(str(tmp_path / "base"))
    expected = LEFT[case](model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = read_adapter(tmp_path / "a", base=tmp_path / "base")
    assert (logits(model) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged(model, factors)), expected, atol=5e-6, rtol=0)
