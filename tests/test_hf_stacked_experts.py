"""Adapters with all experts of a layer in one tensor, against PEFT with an expert each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter, write_adapter
from tests.support.hf_models import (
    HIDDEN,
    LAYERS,
    MOE_FFN,
    NUM_EXPERTS,
    VOCAB,
    hf_model,
    logits,
    merged,
    peft_model,
)

RANK, ALPHA = 4, 8
TOLERANCE = 5e-6
LAYER = "base_model.model.model.layers.{}."
ATTENTION = {"q_proj": (HIDDEN, 64), "o_proj": (64, HIDDEN)}
# Tinker's name -> PEFT's, features in and out, and experts of A and of B.
SHARED_OUTER = {
    "w1": ("gate_proj", HIDDEN, MOE_FFN, 1, NUM_EXPERTS),
    "w3": ("up_proj", HIDDEN, MOE_FFN, 1, NUM_EXPERTS),
    "w2": ("down_proj", MOE_FFN, HIDDEN, NUM_EXPERTS, 1),
}


@pytest.fixture(scope="module")
def moe() -> torch.nn.Module:
    return hf_model("qwen3_moe")


def save(directory: Path, tensors: dict[str, Tensor], **fields: object) -> Path:
    """Write an adapter directory as others do, by hand."""
    directory.mkdir()
    given = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(given, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def pair(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes) * 0.1


def attention() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for leaf, (num_in, out) in ATTENTION.items():
            name = LAYER.format(layer) + f"self_attn.{leaf}"
            tensors |= pair(name, randn(RANK, num_in), randn(out, RANK))
    return tensors


def of_tinker(unembedding: str = "model.unembed_tokens") -> tuple[dict[str, Tensor], ...]:
    """Return the tensors of Tinker's layout, and the same ones as PEFT loads them."""
    torch.manual_seed(5)
    dense, experts, single = attention(), {}, {}
    for layer in range(LAYERS):
        for name, (leaf, num_in, out, num_a, num_b) in SHARED_OUTER.items():
            prefix = LAYER.format(layer) + "mlp.experts"
            a, b = randn(num_a, RANK, num_in), randn(num_b, out, RANK)
            experts |= pair(f"{prefix}.{name}", a, b)
            for expert in range(NUM_EXPERTS):
                one_a, one_b = a[expert % num_a], b[expert % num_b]
                single |= pair(f"{prefix}.{expert}.{leaf}", one_a, one_b)
    a, b = randn(RANK, HIDDEN), randn(VOCAB, RANK)
    theirs = pair(f"base_model.model.{unembedding}", a, b)
    return {**dense, **experts, **theirs}, {
        **dense,
        **single,
        **pair("base_model.model.lm_head", a, b),
    }


def peft_logits(moe: torch.nn.Module, directory: Path, tensors: dict[str, Tensor]) -> Tensor:
    targets = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    targets += ["lm_head"] if "base_model.model.lm_head.lora_A.weight" in tensors else []
    fields = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    return logits(peft_model(moe, save(directory, tensors, **fields)))


@pytest.mark.parametrize("unembedding", ["model.unembed_tokens", "unembed_tokens"])
def test_an_adapter_of_tinker_is_what_peft_computes_expert_by_expert(unembedding, moe, tmp_path):
    tensors, single = of_tinker(unembedding)
    targets = [*ATTENTION, "experts", "unembed_tokens"] if "model" in unembedding else "all-linear"
    factors = read_adapter(save(tmp_path / "tinker", tensors, target_modules=targets))
    expected = peft_logits(moe, tmp_path / "peft", single)
    assert (logits(moe) - expected).abs().max() > 0.05
    assert (logits(merged(moe, factors)) - expected).abs().max() < TOLERANCE
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swapped = {
        ".".join([*name.split(".")[:-1], other.get(leaf := name.split(".")[-1], leaf)]): module
        for name, module in factors.items()
    }
    assert (logits(merged(moe, swapped)) - expected).abs().max() > 1e-4, "w1 is the gate"


def test_an_adapter_of_tinker_is_written_as_it_was_read_bit_for_bit(tmp_path):
    tensors, _ = of_tinker()
    factors = read_adapter(save(tmp_path / "a", tensors, target_modules="all-linear"))
    write_adapter(tmp_path / "b", factors, base_model_name="tiny", format="tinker")
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["target_modules"] == "all-linear"


@pytest.mark.parametrize("dims", ["experts first", "experts last"])
def test_stacked_factors_of_expert_parameters_are_what_peft_computes(dims, moe, tmp_path):
    torch.manual_seed(6)
    dense, stacked, single = attention(), {}, {}
    for layer in range(LAYERS):
        prefix = LAYER.format(layer) + "mlp.experts"
        a, b = randn(NUM_EXPERTS, RANK, HIDDEN), randn(NUM_EXPERTS, 2 * MOE_FFN, RANK)
        down = randn(NUM_EXPERTS, RANK, MOE_FFN), randn(NUM_EXPERTS, HIDDEN, RANK)
        if dims == "experts first":
            stacked |= pair(f"{prefix}.gate_up_proj", a, b)
            stacked |= pair(f"{prefix}.down_proj", *down)
        else:
            stacked |= pair(f"{prefix}.base_layer", a, b.permute(1, 2, 0))
            stacked |= pair(prefix, down[0], down[1].permute(1, 2, 0))
        for expert in range(NUM_EXPERTS):
            gate, up = b[expert].chunk(2)
            single |= pair(f"{prefix}.{expert}.gate_proj", a[expert], gate)
            single |= pair(f"{prefix}.{expert}.up_proj", a[expert], up)
            single |= pair(f"{prefix}.{expert}.down_proj", down[0][expert], down[1][expert])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    fields = {"target_modules": list(ATTENTION), "target_parameters": parameters}
    factors = read_adapter(save(tmp_path / "a", {**dense, **stacked}, **fields))
    expected = peft_logits(moe, tmp_path / "peft", {**dense, **single})
    assert (logits(moe) - expected).abs().max() > 0.05
    assert (logits(merged(moe, factors)) - expected).abs().max() < TOLERANCE


def test_other_ranks_and_scales_become_one_without_changing_an_update(tmp_path):
    tensors, _ = of_tinker()
    factors = read_adapter(save(tmp_path / "a", tensors))
    name = "model.layers.0.self_attn.q_proj"
    factors[name] = LoRAFactors(randn(2, HIDDEN), randn(64, 2), 0.7)
    write_adapter(tmp_path / "b", factors, base_model_name="tiny", format="tinker")
    found = read_adapter(tmp_path / "b")
    assert (found[name].rank, found[name].scale) == (RANK, ALPHA / RANK)
    for key, module in factors.items():
        torch.testing.assert_close(found[key].delta(), module.delta())


def test_a_projection_that_a_model_does_not_have_may_be_empty(tmp_path):
    tensors, _ = of_tinker()
    for key in [key for key in tensors if ".w3." in key]:
        tensors[key] = torch.empty(0)
    names = read_adapter(save(tmp_path / "a", tensors))
    assert not [name for name in names if "up_proj" in name]
    assert f"model.layers.1.mlp.experts.{NUM_EXPERTS - 1}.gate_proj" in names


def test_factors_that_all_experts_share_are_read_where_others_say_how_many(tmp_path):
    tensors, _ = of_tinker()
    key = LAYER.format(1) + "mlp.experts.w2.lora_A.weight"
    tensors[key] = tensors[key][:1]
    factors = read_adapter(save(tmp_path / "a", tensors))
    last = factors[f"model.layers.1.mlp.experts.{NUM_EXPERTS - 1}.down_proj"]
    assert torch.equal(last.lora_A, tensors[key][0])


def test_experts_with_factors_of_their_own_are_not_written_as_shared_ones(tmp_path):
    tensors, _ = of_tinker()
    key = LAYER.format(0) + "mlp.experts.w1.lora_A.weight"
    tensors[key] = randn(NUM_EXPERTS, RANK, HIDDEN)
    factors = read_adapter(save(tmp_path / "a", tensors))
    with pytest.raises(ValueError, match=r"1\.gate_proj.*--lora-expert-mode shared_outer"):
        write_adapter(tmp_path / "b", factors, base_model_name="tiny", format="tinker")
    assert not (tmp_path / "b").exists()


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((NUM_EXPERTS, HIDDEN, RANK), r"w1: .*expected \[E, 4, in\]"),
        ((RANK, HIDDEN), r"w1: .*expected \[E, 4, in\]"),
        ((NUM_EXPERTS - 1, RANK, HIDDEN), r"\[15, 16\] in number"),
    ],
)
def test_stacked_factors_of_other_sizes_are_refused_by_name(shape, message, tmp_path):
    tensors, _ = of_tinker()
    tensors[LAYER.format(0) + "mlp.experts.w1.lora_A.weight"] = randn(*shape)
    with pytest.raises(ValueError, match=message):
        read_adapter(save(tmp_path / "a", tensors))
