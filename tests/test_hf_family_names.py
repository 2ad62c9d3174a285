"""Experts, shared experts and routers by each family's own names, against PEFT and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.factors import LoRAFactors
from megalora.hf.inspect import inspect_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import read_adapter, write_adapter
from megalora.hf.servers import SERVERS
from megalora.hf.servers.outline import outline_of_directory
from megalora.model.config_json import model_shape
from megalora.model.families import names_of
from megalora.model.served import ServedModel
from megalora.model.shape import ModelShape
from tests.support.hf_models import (
    NUM_EXPERTS,
    VOCAB,
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    random_factors,
    shared_outer,
    stored,
    trained_by_peft,
)

FAMILIES = ("mixtral", "qwen2_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "qwen3_next")
# Experts have a rank of their own, shared ones and routers the rank of everything else.
RANKS = {"lm_head": (2, 4.0), ".experts.": (4, 0.5), "": (8, 2.0)}
TOLERANCE = 5e-5
Factors = dict[str, LoRAFactors]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return hf_model(family)


@pytest.fixture(scope="module")
def factors(model: Any) -> Factors:
    return random_factors(model, RANKS, routers=True)


def shape_of(model: Any) -> ModelShape:
    return model_shape(model.config.to_dict())


def write(directory: Path, model: Any, factors: Factors, format: Any = "peft") -> Path:
    shape = shape_of(model)
    write_adapter(
        directory,
        factors,
        base_model_name="tiny",
        format=format,
        names=names_of(shape.model_type),
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts,
        moe_layers=shape.moe_layers,
        delta_layers=shape.delta_layers,
    )
    return directory


def read(directory: Path, model: Any) -> Factors:
    shape = shape_of(model)
    return read_adapter(directory, names=names_of(shape.model_type), hidden_size=shape.hidden_size)


def difference(first: Any, second: torch.Tensor) -> float:
    return (logits(first) - second).abs().max().item()


def same(first: Factors, second: Factors) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(m.lora_A, second[n].lora_A)
        and torch.equal(m.lora_B, second[n].lora_B)
        and m.scale == second[n].scale
        for n, m in first.items()
    )


def peft_verdict(directory: Path, model: Any) -> str:
    served = ServedModel.of({**model.config.to_dict(), "architectures": [type(model).__name__]})
    return "; ".join(SERVERS["peft"].judge(outline_of_directory(directory), served).problems)


@pytest.mark.parametrize("format", ["peft", "peft-3d"])
def test_peft_loads_experts_shared_experts_and_routers(
    format: str, model: Any, factors: Factors, tmp_path: Path
) -> None:
    directory, expected = write(tmp_path / "a", model, factors, format), merged(model, factors)
    loaded = peft_model(model, directory)
    assert difference(loaded, logits(expected)) < TOLERANCE
    assert same(factors, read(directory, model))
    assert not peft_verdict(directory, model)
    for part in (".experts", "shared_expert", "mlp.gate."):
        changed = [p for n, p in loaded.named_parameters() if part in n and "lora_B" in n]
        with torch.no_grad():
            for param in changed:
                param.neg_()
        assert not changed or difference(loaded, logits(expected)) > 1e-4, part


def test_the_rank_of_shared_experts_and_routers_is_that_of_everything_else(
    model: Any, factors: Factors, tmp_path: Path
) -> None:
    config = json.loads((write(tmp_path / "a", model, factors) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    patterns = {rank for name, rank in config["rank_pattern"].items() if "gate_up" not in name}
    assert patterns == {2, 8}


def test_adapters_go_through_megatrons_names_and_back(model: Any) -> None:
    shape = shape_of(model)
    config = LoRAConfig(rank=8, alpha=16.0, expert_rank=4, targets=("all", "router"))
    factors = random_factors(model, {".experts.": (4, 4.0), "": (8, 2.0)}, routers=True)
    tensors = from_hf(factors, config, shape, padded_vocab_size=VOCAB + 6)
    assert same(factors, to_hf(tensors, config, shape))
    moe = {f"decoder.layers.{layer}." for layer in shape.moe_layers}
    of_experts = [
        n for n in tensors if ".experts." in n or ".shared_experts." in n or "router" in n
    ]
    assert {name[: name.index("mlp.")] for name in of_experts} == moe
    shared = [n for n in tensors if ".shared_experts." in n]
    assert bool(shared) == bool(shape.moe_shared_expert_intermediate_size)
    assert all(tensors[n].shape[-2:] == (16, 32) for n in shared if n.endswith("fc1_lora.lora_A"))


@pytest.mark.parametrize("stacked", [False, True], ids=["as saved", "as in memory"])
def test_the_merged_directory_has_the_logits_of_the_merged_model(
    stacked: bool, model: Any, factors: Factors, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model.save_pretrained(str(base))
    if stacked:
        save_file(dict(model.state_dict()), base / "model.safetensors", metadata={"format": "pt"})
    names = set(load_file(base / "model.safetensors"))
    assert any(".1.mlp.experts.gate_up_proj" in name for name in names) == stacked
    merge_adapter(base, factors, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    expected = logits(merged(model, factors))
    assert difference(model, expected) > 0.05
    assert difference(hf_model_from(tmp_path / "out"), expected) < TOLERANCE


TRAINED = {
    "mixtral": {"target_modules": "all-linear"},
    "qwen2_moe": {
        "target_modules": ["q_proj", "shared_expert.up_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
    },
    "glm4_moe": {"target_modules": "all-linear"},
    "glm4_moe_lite": {"target_modules": "all-linear"},
    "deepseek_v3": {"target_modules": "all-linear"},
    "qwen3_next": {"target_modules": "all-linear"},
}


def test_an_adapter_that_peft_trained_is_read_by_the_familys_names(
    family: str, model: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=6, lora_alpha=9, task_type="CAUSAL_LM", **TRAINED[family])
    expected = trained_by_peft(model, config, tmp_path / "a")
    assert difference(model, expected) > 1e-3
    factors = read(tmp_path / "a", model)
    assert difference(merged(model, factors), expected) < TOLERANCE
    for name in ("mlp.gate", "mlp.experts.3.up_proj"):
        assert stored(model, f"model.layers.1.{name}") in factors
    assert (
        difference(peft_model(model, write(tmp_path / "b", model, factors)), expected) < TOLERANCE
    )


@pytest.mark.parametrize("part", ["experts of one layer", "shared experts", "routers"])
def test_peft_loads_adapters_of_some_modules_and_no_others(
    part: str, family: str, model: Any, factors: Factors, tmp_path: Path
) -> None:
    gate, up, _ = names_of(family).projections
    ends = {
        "experts of one layer": (f"experts.3.{gate}", f"experts.11.{up}"),
        "shared experts": ("gate_proj", "up_proj", "down_proj"),
        "routers": (".gate",),
    }[part]
    some = {n: m for n, m in factors.items() if "layers.1." in n and n.endswith(ends)}
    if part == "shared experts":
        some = {name: module for name, module in some.items() if ".experts." not in name}
    if (family, part) == ("mixtral", "shared experts"):
        assert not some
        return
    directory = write(tmp_path / "a", model, some)
    keys = load_file(directory / "adapter_model.safetensors")
    assert not [key for key in keys if "layers.0." in key]
    assert read(directory, model).keys() == some.keys()
    assert not peft_verdict(directory, model)
    assert difference(peft_model(model, directory), logits(merged(model, some))) < TOLERANCE


def test_an_adapter_of_a_shared_experts_gate_can_be_merged_and_not_trained_on(
    tmp_path: Path,
) -> None:
    model = hf_model("qwen2_moe")
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    expected = trained_by_peft(model, config, tmp_path / "a")
    factors = read(tmp_path / "a", model)
    gate = "model.layers.1.mlp.shared_expert_gate"
    without = {name: module for name, module in factors.items() if name != gate}
    assert difference(merged(model, without), expected) > 1e-4
    with pytest.raises(ValueError, match=r"shared_expert_gate is a shared expert's gate"):
        from_hf(factors, LoRAConfig(rank=4), shape_of(model))
    model.save_pretrained(str(tmp_path / "base"))
    merge_adapter(tmp_path / "base", factors, tmp_path / "out")
    assert difference(hf_model_from(tmp_path / "out"), expected) < TOLERANCE


def as_transformers_4(directory: Path) -> Path:
    """Give an adapter the configuration that PEFT wrote where every projection was a linear."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    keys = load_file(directory / "adapter_model.safetensors")
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in keys})
    patterns = {name: {} for name in ("rank_pattern", "alpha_pattern")}
    path.write_text(
        json.dumps({**config, **patterns, "target_modules": targets, "target_parameters": None})
    )
    return directory


def test_an_adapter_of_transformers_4_is_read_and_what_peft_leaves_out_is_said(
    family: str, model: Any, tmp_path: Path
) -> None:
    # A router of Qwen2-MoE that target_modules names PEFT refuses by itself.
    factors = random_factors(model, {"": (4, 0.5)}, routers=family != "qwen2_moe")
    directory = as_transformers_4(write(tmp_path / "a", model, factors))
    assert same(factors, read(directory, model))
    said = peft_verdict(directory, model)
    if family == "mixtral":
        assert not said
        assert difference(peft_model(model, directory), logits(merged(model, factors))) < TOLERANCE
        return
    lost = "loads none of the experts" if family == "qwen2_moe" else "takes the names of"
    assert lost in said
    with pytest.raises(AssertionError, match=r"expert.*lora_A"):
        peft_model(model, directory)


def test_tinkers_layout_has_every_familys_experts_as_w1_w3_and_w2(
    model: Any, factors: Factors, tmp_path: Path
) -> None:
    shared = shared_outer({n: m for n, m in factors.items() if ".experts." in n})
    directory = write(tmp_path / "a", model, shared, "tinker")
    place = stored(model, "model.layers.1.mlp.experts")
    keys = load_file(directory / "adapter_model.safetensors")
    assert f"base_model.model.{place}.w2.lora_A.weight" in keys
    assert same(shared, read(directory, model))


def test_inspect_names_a_mixtral_as_its_file_does(tmp_path: Path) -> None:
    model = hf_model("mixtral")
    factors = random_factors(model, RANKS, routers=True)
    for format, kind in (("peft", "w3"), ("peft-3d", "up_proj")):
        report = inspect_peft(write(tmp_path / format, model, factors, format))
        assert f"model.layers.*.block_sparse_moe.experts.*.{kind} " in report.table()
        assert not report.warnings


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate", "a shared expert's gate.*megalora merge"),
        ("glm4_moe", "mlp.shared_expert.up_proj", "belongs to another model"),
        ("mixtral", "mlp.experts.0.gate_proj", "belongs to another model"),
        ("qwen3_moe", "mlp.shared_experts.up_proj", "belongs to another model"),
    ],
)
def test_a_module_that_the_family_does_not_have_is_refused_by_name(
    family: str, name: str, message: str
) -> None:
    shape = shape_of(hf_model(family))
    one = {f"model.layers.1.{name}": LoRAFactors(torch.ones(2, 32), torch.ones(20, 2), 1.0)}
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        from_hf(one, LoRAConfig(rank=2), shape)


@pytest.mark.bad_input("a malformed file")
def test_shared_experts_are_refused_in_a_layer_without_experts() -> None:
    shape = shape_of(hf_model("glm4_moe"))
    module = LoRAFactors(torch.ones(2, 32), torch.ones(48, 2), 1.0)
    name = "model.layers.{}.mlp.shared_experts.up_proj"
    from_hf({name.format(1): module}, LoRAConfig(rank=2), shape)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.shared_experts"):
        from_hf({name.format(0): module}, LoRAConfig(rank=2), shape)


@pytest.mark.bad_input("a malformed file")
def test_a_dense_adapter_is_refused_by_a_mixtral_with_the_names_that_it_has(tmp_path: Path) -> None:
    model = hf_model("mixtral")
    factors = random_factors(hf_model("mistral"), {"": (2, 1.0)})
    write_adapter(tmp_path / "a", factors, base_model_name="x")
    with pytest.raises(ValueError, match=r"no adapter for: model\.layers\.0\.mlp\.down_proj"):
        from_hf(read(tmp_path / "a", model), LoRAConfig(rank=2), shape_of(model))


@pytest.mark.bad_input("a malformed file")
def test_experts_by_another_familys_names_are_not_written(tmp_path: Path) -> None:
    model = hf_model("mixtral")
    factors = random_factors(model, RANKS)
    with pytest.raises(ValueError, match=r"w1 is none of gate_proj, up_proj, down_proj"):
        write_adapter(tmp_path / "a", factors, base_model_name="x", num_experts=NUM_EXPERTS)
    assert not (tmp_path / "a").exists()
