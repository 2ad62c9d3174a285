"""Configurations and directories of adapters: as PEFT takes them, or refused by their names."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, MontecloraConfig, PeftType, VeloraConfig

from megalora.hf.factors import LoRAFactors
from megalora.hf.foreign import refuse_foreign
from megalora.hf.misfits import why_not, why_not_in_model
from megalora.hf.peft import read_adapter, write_adapter
from megalora.hf.peft_fields import HARMLESS, REFUSED
from megalora.model.config_json import load_config, model_shape
from tests.support.hf_models import hf_model, logits, merged, trained_by_peft
from tests.support.honest import LLAMA

MALFORMED = pytest.mark.bad_input("a malformed file")
NAME = "model.layers.0.self_attn.q_proj"
FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}
# Variants that compute what plain LoRA does where they are not trained, as PEFT shows below.
PLAIN = {
    "velora_config": VeloraConfig(num_groups=4),
    "monteclora_config": MontecloraConfig(),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = {NAME: LoRAFactors(torch.ones(2, 8), torch.ones(6, 2), 1.0)}
    write_adapter(tmp_path / "a", factors, base_model_name="tiny")
    return tmp_path / "a"


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# === The configuration ===


@pytest.mark.parametrize(
    "field", [name for name in FIELDS if name not in ("peft_type", "r", "lora_alpha", "use_rslora")]
)
def test_what_is_empty_is_no_use_of_a_field(field, adapter):
    for unused in (None, False, [], {}, ""):
        change_config(adapter, **{field: unused})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_adapter(adapter)[NAME].scale == 1, unused


def test_every_field_of_the_installed_peft_is_known():
    # Of a new one its meaning has to be looked up: does it change what an adapter computes?
    assert FIELDS.keys() <= HARMLESS | REFUSED.keys()
    variants = {name for name, field in FIELDS.items() if field.metadata.get("is_lora_variant")}
    assert variants <= REFUSED.keys() | PLAIN.keys()


CASES = {
    **{name: {name: value} for name, value in PLAIN.items()},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "no start": {"init_lora_weights": False},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "all biases of a model without": {"bias": "all"},
    "empty lists": {
        "modules_to_save": [],
        "alora_invocation_tokens": [],
        "layer_replication": [],
        "layers_to_transform": [],
        "exclude_modules": [],
    },
    "one layer": {"layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*layers\.1\..*_proj"},
    "weights kept tied": {"ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_trains_has_its_logits_here(case, tmp_path):
    model = hf_model("llama")
    fields = {"target_modules": ["q_proj", "up_proj"], **CASES[case]}
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
    expected = trained_by_peft(model, config, tmp_path / "a")
    assert (logits(model) - expected).abs().max() > 1e-3
    ours = logits(merged(model, read_adapter(tmp_path / "a")))
    torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0)


STARTS = ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "of_tomorrow"]


@MALFORMED
@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_changes_the_base_is_refused(start, adapter):
    change_config(adapter, init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{start}'.*save_pretrained\(path"):
        read_adapter(adapter)


@MALFORMED
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_something", True),
        ("xlora_depth", 2),
        ("new_config", {"a": 1}),
        ("new_switch", True),
    ],
)
def test_a_field_that_may_switch_something_on_is_refused(field, value, adapter):
    change_config(adapter, **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config uses {field} \(not known here\)"):
        read_adapter(adapter)


@MALFORMED
@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind.value != "LORA"])
def test_another_peft_type_is_refused_by_its_name(kind, adapter):
    change_config(adapter, peft_type=kind)
    with pytest.raises(ValueError, match=rf"peft_type is '{kind}': must be 'LORA': convert"):
        read_adapter(adapter)


@MALFORMED
def test_a_configuration_of_mlx_is_named(adapter):
    path = adapter / "adapter_config.json"
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4}, "num_layers": 2}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"adapter_config is MLX's.*mlx_lm\.fuse"):
        read_adapter(adapter)


@MALFORMED
def test_modules_to_save_that_were_not_saved_are_refused(adapter):
    # PEFT names two by itself for a model that classifies.
    change_config(adapter, modules_to_save=["classifier", "score"])
    assert list(read_adapter(adapter)) == [NAME]
    change_config(adapter, modules_to_save=["score", "lm_head"])
    with pytest.raises(ValueError, match=r"modules_to_save has lm_head, .*not in the file"):
        read_adapter(adapter)


# === Directories ===

FORMS = {
    "is MLX's adapter": ["adapters.safetensors", "0000100_adapters.safetensors"],
    "adapter_model.bin, a pickle.*save_pretrained": ["adapter_config.json", "adapter_model.bin"],
    "no adapter_config.json": ["adapter_model.safetensors"],
    "model.safetensors instead of": ["adapter_config.json", "model.safetensors"],
    "checkpoint-5, checkpoint-10, checkpoint-200": [
        *(f"checkpoint-{step}/adapter_config.json" for step in (10, 200, 5)),
        "trainer_state.json",
    ],
    "give one of first, second": [f"{name}/adapter_config.json" for name in ("first", "second")],
    "is Megatron-Bridge's.*export_adapter_ckpt": [
        "latest_checkpointed_iteration.txt",
        "iter_0000010/run_config.yaml",
    ],
    "is NeMo's": ["context/model.yaml", "weights/.metadata"],
    "is DeepSpeed's.*zero_to_fp32.py": ["zero_to_fp32.py", "global_step10/x_optim_states.pt"],
    "is FSDP's.*accelerate merge-weights": ["pytorch_model_fsdp_0/__0_0.distcp"],
    "is torchtune's": ["adapter_0.pt", "config.json"],
    "is diffusers'": ["pytorch_lora_weights.safetensors"],
    "is a whole model.*--hf-model": ["config.json", "model-00001-of-00002.safetensors"],
    "is a checkpoint of Megatron.*megalora export": ["latest_checkpointed_iteration.txt"],
}


def touch(place: Path, names: list[str]) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("{}")
    return place


@MALFORMED
@pytest.mark.parametrize("said", FORMS)
def test_a_directory_of_another_form_is_named(said, tmp_path):
    directory = touch(tmp_path / "a", FORMS[said])
    with pytest.raises(ValueError, match=rf"^{directory} .*{said}"):
        read_adapter(directory)


def test_checkpoints_of_megatron_and_what_is_not_known_are_left_to_their_readers(adapter, tmp_path):
    tracker = "latest_checkpointed_iteration.txt"
    run = touch(tmp_path / "run", [tracker, "hf/adapter_config.json"])
    for directory in (adapter, run, touch(tmp_path / "other", ["notes.txt"])):
        refuse_foreign(directory, checkpoints=True)


@MALFORMED
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_model.safetensors", "give its directory"),
        ("adapter_config.json", "give its directory"),
        ("lora.safetensors", "is one file"),
        ("model.nemo", "NeMo"),
        ("lora.gguf", "GGUF"),
        ("adapter.bin", "pickle"),
        ("nothing", "does not exist"),
    ],
)
def test_a_file_in_place_of_a_directory_is_named(name, said, tmp_path):
    if name != "nothing":
        touch(tmp_path, [name])
    with pytest.raises(ValueError, match=rf"{name} .*{said}"):
        read_adapter(tmp_path / name)


@MALFORMED
def test_an_adapter_in_place_of_a_base_is_named(adapter):
    with pytest.raises(ValueError, match="is an adapter, no base"):
        load_config(adapter)


def test_an_adapter_beside_other_files_is_read(adapter):
    touch(adapter, ["config.json", "model.safetensors", "checkpoint-5/adapter_config.json"])
    touch(adapter, ["zero_to_fp32.py", "adapter_model.bin", "trainer_state.json"])
    assert list(read_adapter(adapter)) == [NAME]


# === Another model ===

WHY = {
    "model.decoder.layers.1.self_attn.q_proj": "start with 'model.decoder.', the base's with 'mod",
    "model.layers.7.self_attn.q_proj": "up to layer 7, the base has 2 layers",
    "model.visual.blocks.0.attn.qkv": "images or sound",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": "images or sound",
    "model.layers.0.self_attn.qkv_proj": "several projections in one",
    "model.layers.0.self_attn.wq": "belongs to another model",
}


@pytest.mark.parametrize("name", WHY)
def test_the_cause_is_said_where_a_module_is_not_the_base_s(name):
    known = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert WHY[name] in why_not([name], [*known, "lm_head", "model.norm"])
    assert WHY[name] in why_not_in_model([name], model_shape(LLAMA))
