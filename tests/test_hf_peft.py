"""PEFT directories, checked with the real peft and transformers against a merge made without."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter, write_adapter
from tests.support.hf_models import (
    HIDDEN,
    LAYERS,
    NUM_EXPERTS,
    hf_model,
    logits,
    merged,
    peft_model,
    random_factors,
    trained_by_peft,
)

DENSE = {"lm_head": (2, 4.0), "self_attn": (8, 2.0), "mlp": (4, 0.5)}
MOE = {"lm_head": (2, 4.0), "self_attn": (8, 2.0), "experts": (4, 0.5)}
TOLERANCE = 5e-6
# The other formats are for servers alone.
OF_PEFT = ("peft", "uniform", "peft-3d")


@pytest.fixture(scope="module")
def moe() -> torch.nn.Module:
    return hf_model("qwen3_moe")


@pytest.fixture(scope="module")
def moe_factors(moe) -> dict[str, LoRAFactors]:
    return random_factors(moe, MOE)


def difference(first: torch.nn.Module, second: torch.nn.Module) -> float:
    return (logits(first) - logits(second)).abs().max().item()


def same_factors(first: dict[str, LoRAFactors], second: dict[str, LoRAFactors]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(m.lora_A, second[n].lora_A)
        and torch.equal(m.lora_B, second[n].lora_B)
        and m.scale == second[n].scale
        for n, m in first.items()
    )


@pytest.mark.parametrize("format", OF_PEFT)
def test_peft_gives_the_logits_of_the_merged_moe_model(format, moe, moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny", format=format)
    loaded, reference = peft_model(moe, tmp_path / "a"), merged(moe, moe_factors)
    assert difference(moe, reference) > 0.05
    assert difference(loaded, reference) < TOLERANCE
    with torch.no_grad():
        for name, param in loaded.named_parameters():
            if "layers.1" in name and "experts" in name and "lora_B" in name:
                param.neg_()
    assert difference(loaded, reference) > 1e-4, "a wrong sign in one layer has to be noticed"


@pytest.mark.parametrize("format", OF_PEFT)
def test_peft_loads_the_dense_layers_of_a_mixture_of_experts(format, tmp_path):
    mixed = hf_model("qwen3_moe", mlp_only_layers=[0])
    factors = random_factors(mixed, {**MOE, "mlp": (8, 2.0)})
    write_adapter(tmp_path / "a", factors, base_model_name="tiny", format=format)
    loaded, reference = peft_model(mixed, tmp_path / "a"), merged(mixed, factors)
    assert difference(loaded, reference) < TOLERANCE
    assert difference(loaded.merge_and_unload(), reference) < TOLERANCE
    read = read_adapter(tmp_path / "a")
    assert read.keys() == factors.keys()
    assert difference(merged(mixed, read), reference) < TOLERANCE


def test_dense_layers_get_no_experts_where_only_experts_have_adapters(tmp_path):
    mixed = hf_model("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3)
    factors = random_factors(mixed, {**MOE, "mlp": (8, 2.0)})
    some = {name: module for name, module in factors.items() if "layers.2.mlp.experts" in name}
    write_adapter(tmp_path / "a", some, base_model_name="tiny", num_layers=3, moe_layers=[1, 2])
    assert difference(peft_model(mixed, tmp_path / "a"), merged(mixed, some)) < TOLERANCE


@pytest.mark.parametrize("format", OF_PEFT)
def test_an_adapter_that_peft_loads_merges_and_saves_again_stays_the_same(
    format, moe, moe_factors, tmp_path
):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny", format=format)
    reference = merged(moe, moe_factors)
    model = peft_model(moe, tmp_path / "a")
    model.delete_adapter("again")
    model.save_pretrained(str(tmp_path / "b"))
    assert difference(peft_model(moe, tmp_path / "b"), reference) < TOLERANCE
    ours = merged(moe, read_adapter(tmp_path / "b"))
    assert difference(ours, reference) < TOLERANCE
    assert difference(model.merge_and_unload(), reference) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("format", ["peft", "uniform"])
def test_peft_gives_the_logits_of_the_merged_dense_model(format, family, tied, tmp_path):
    model = hf_model(family, tied=tied)
    factors = random_factors(model, DENSE)
    write_adapter(tmp_path / "a", factors, base_model_name="tiny", format=format)
    assert difference(peft_model(model, tmp_path / "a"), merged(model, factors)) < TOLERANCE


@pytest.mark.parametrize("format", ["peft", "peft-3d"])
def test_what_is_written_is_read_back_bit_for_bit(format, moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny", format=format)
    factors = read_adapter(tmp_path / "a")
    assert same_factors(moe_factors, factors)
    write_adapter(tmp_path / "b", factors, base_model_name="tiny", format=format)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_moe_configuration_has_the_expert_rank_as_r(moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    attention = r"self_attn\.(k_proj|o_proj|q_proj|v_proj)"
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["rank_pattern"] == {attention: 8, "lm_head": 2}
    assert config["alpha_pattern"] == {attention: 16, "lm_head": 8}


def test_the_unembedding_base_layer_is_never_written(moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny")
    assert not [
        k for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if "base_layer" in k
    ]


def test_adapters_of_some_projections_get_zeros_where_peft_needs_all(moe, moe_factors, tmp_path):
    some = {n: m for n, m in moe_factors.items() if "experts.3.up_proj" in n or "v_proj" in n}
    some = {
        n: m for n, m in some.items() if not (n.startswith("model.layers.0") and "experts" in n)
    }
    write_adapter(tmp_path / "a", some, base_model_name="tiny", num_experts=NUM_EXPERTS)
    assert difference(peft_model(moe, tmp_path / "a"), merged(moe, some)) < TOLERANCE


@pytest.mark.parametrize("format", OF_PEFT)
def test_only_layers_and_projections_with_adapters_are_read_back(
    format, moe, moe_factors, tmp_path
):
    some = {n: m for n, m in moe_factors.items() if "layers.1.mlp.experts" in n or "v_proj" in n}
    some = {n: m for n, m in some.items() if "down_proj" not in n}
    write_adapter(tmp_path / "a", some, base_model_name="tiny", num_experts=NUM_EXPERTS)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert not [key for key in keys if "layers.0.mlp" in key]
    read = read_adapter(tmp_path / "a")
    assert read.keys() == some.keys()
    reference = merged(moe, some)
    assert difference(merged(moe, read), reference) < TOLERANCE
    if format != "uniform":
        assert difference(peft_model(moe, tmp_path / "a"), reference) < TOLERANCE


def test_peft_loads_dense_layers_where_no_expert_has_an_adapter(tmp_path):
    mixed = hf_model("qwen3_moe", mlp_only_layers=[0])
    factors = random_factors(mixed, {**MOE, "mlp": (8, 2.0)})
    dense = {name: module for name, module in factors.items() if "experts" not in name}
    base = {"num_layers": LAYERS, "num_experts": NUM_EXPERTS, "moe_layers": [1]}
    write_adapter(tmp_path / "a", dense, base_model_name="tiny", **base)
    assert difference(peft_model(mixed, tmp_path / "a"), merged(mixed, dense)) < TOLERANCE


def test_adapters_that_are_zero_in_both_factors_are_not_read(moe_factors, tmp_path):
    ghosts = {
        name: LoRAFactors(torch.zeros_like(m.lora_A), torch.zeros_like(m.lora_B), m.scale)
        for name, m in moe_factors.items()
        if "layers.0.mlp" in name
    }
    write_adapter(tmp_path / "a", {**moe_factors, **ghosts}, base_model_name="tiny")
    assert read_adapter(tmp_path / "a").keys() == moe_factors.keys() - ghosts.keys()
    write_adapter(tmp_path / "b", ghosts, base_model_name="tiny")
    assert read_adapter(tmp_path / "b").keys() == ghosts.keys(), "an adapter has some module"


@pytest.mark.parametrize("format", OF_PEFT)
def test_peft_loads_the_adapters_of_routers(format, moe, moe_factors, tmp_path):
    factors = dict(moe_factors)
    for layer in range(LAYERS):
        a, b = torch.randn(3, HIDDEN), torch.randn(NUM_EXPERTS, 3)
        factors[f"model.layers.{layer}.mlp.gate"] = LoRAFactors(a, b, 0.25)
    write_adapter(tmp_path / "a", factors, base_model_name="tiny", format=format)
    reference = merged(moe, factors)
    assert difference(merged(moe, moe_factors), reference) > 0.05
    assert difference(peft_model(moe, tmp_path / "a"), reference) < TOLERANCE


def test_a_layer_without_an_adapter_is_not_targeted(tmp_path):
    model = hf_model("qwen3")
    factors = {n: m for n, m in random_factors(model, DENSE).items() if "layers.0.mlp" not in n}
    write_adapter(tmp_path / "a", factors, base_model_name="tiny", num_layers=LAYERS)
    assert difference(peft_model(model, tmp_path / "a"), merged(model, factors)) < TOLERANCE


def test_every_module_may_have_its_own_rank_and_scale(tmp_path):
    model = hf_model("qwen3")
    factors = {}
    for index, (name, module) in enumerate(random_factors(model, {"": (8, 1.0)}).items()):
        rank = 1 + index % 5
        a, b = module.lora_A[:rank], module.lora_B[:, :rank]
        factors[name] = LoRAFactors(a, b, 0.25 * (1 + index % 3))
    write_adapter(tmp_path / "a", factors, base_model_name="tiny")
    assert same_factors(factors, read_adapter(tmp_path / "a"))
    assert difference(peft_model(model, tmp_path / "a"), merged(model, factors)) < TOLERANCE


TRAINED = {
    "dense": ("qwen3", {"target_modules": "all-linear"}),
    "unembedding": ("llama", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "rslora": (
        "qwen3",
        {
            "target_modules": ["k_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {"layers.1.mlp.up_proj": 7},
        },
    ),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "one expert parameter": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "routers among all linears": ("qwen3_moe", {"target_modules": "all-linear"}),
    "experts of one layer": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("case", TRAINED)
def test_an_adapter_trained_by_peft_is_read_with_its_rules(case, tmp_path):
    family, fields = TRAINED[case]
    model = hf_model(family)
    config = LoraConfig(r=6, lora_alpha=9, task_type="CAUSAL_LM", **fields)
    expected = trained_by_peft(model, config, tmp_path / "a")
    factors = read_adapter(tmp_path / "a")
    assert (logits(model) - expected).abs().max() > 1e-3
    assert (logits(merged(model, factors)) - expected).abs().max() < TOLERANCE
    write_adapter(tmp_path / "b", factors, base_model_name="tiny")
    again = logits(peft_model(model, tmp_path / "b"))
    assert (again - expected).abs().max() < TOLERANCE


def swap_to_old_layout(directory: Path) -> None:
    """Store 3-D experts as PEFT <= 0.19.0 did: A holds Bᵀ, B holds Aᵀ."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        key_b = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[key_b]
        a = a.reshape(NUM_EXPERTS, -1, a.shape[1])  # [E, r, in]
        b = b.reshape(b.shape[0], -1, NUM_EXPERTS)  # [out, r, E]
        tensors[key] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[key_b] = a.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_old_3d_layout_is_read_as_the_new_one(moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny", format="peft-3d")
    swap_to_old_layout(tmp_path / "a")
    factors = read_adapter(tmp_path / "a")
    assert factors.keys() == moe_factors.keys()
    for name, module in moe_factors.items():
        torch.testing.assert_close(factors[name].delta(), module.delta(), atol=1e-6, rtol=0)


def test_several_shards_are_read_as_one(moe_factors, tmp_path):
    write_adapter(tmp_path / "a", moe_factors, base_model_name="tiny")
    whole = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(whole)
    weight_map = {}
    for number, parity in enumerate((0, 1), start=1):
        part = dict(list(tensors.items())[parity::2])
        name = f"adapter_model-0000{number}-of-00002.safetensors"
        save_file(part, tmp_path / "a" / name)
        weight_map |= dict.fromkeys(part, name)
    whole.unlink()
    index = tmp_path / "a" / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same_factors(moe_factors, read_adapter(tmp_path / "a"))


def test_a_bf16_adapter_is_folded_into_uniform_without_rounding(tmp_path):
    a, b = torch.randn(3, 8).bfloat16(), torch.randn(5, 3).bfloat16()
    factors = {"lm_head": LoRAFactors(a, b, 0.3)}
    write_adapter(tmp_path / "a", factors, base_model_name="tiny", format="uniform")
    read = read_adapter(tmp_path / "a")["lm_head"]
    assert read.scale == 1
    assert torch.equal(read.lora_B, b.float() * 0.3)
