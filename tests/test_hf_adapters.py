"""Adapters between Megatron's rows and Hugging Face's names, on full tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.peft import read_adapter, write_adapter
from megalora.model.shape import ModelShape
from tests.support.full_adapters import DENSE, MOE, PADDED, megatron_adapter


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def head_by_head(fused: Tensor, shape: ModelShape) -> dict[str, Tensor]:
    """Pick q, k, v rows out of a fused [rows, h] one head at a time."""
    d, per_group = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups
    picked: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": [], "v_proj": []}
    row = 0
    for _ in range(shape.num_query_groups):
        for name in ["q_proj"] * per_group + ["k_proj", "v_proj"]:
            picked[name].append(fused[row : row + d])
            row += d
    return {name: torch.cat(heads) for name, heads in picked.items()}


def test_each_projection_gets_its_own_a_and_the_rows_of_its_heads():
    config = LoRAConfig(rank=4)
    tensors = megatron_adapter(DENSE, config)
    factors = to_hf(tensors, config, DENSE)
    a = tensors["decoder.layers.1.self_attention.linear_qkv_lora.lora_A"]
    b = head_by_head(tensors["decoder.layers.1.self_attention.linear_qkv_lora.lora_B"], DENSE)
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        module = factors[f"model.layers.1.self_attn.{name}"]
        assert torch.equal(module.lora_A, a[index * 4 : index * 4 + 4])
        assert torch.equal(module.lora_B, b[name])
        assert module.scale == 8
    gate, up = tensors["decoder.layers.0.mlp.linear_fc1_lora.lora_B"].chunk(2)
    assert torch.equal(factors["model.layers.0.mlp.gate_proj"].lora_B, gate)
    assert torch.equal(factors["model.layers.0.mlp.up_proj"].lora_B, up)
    assert factors["lm_head"].lora_B.shape == (11, 4), "padded vocabulary rows are trimmed"


def test_every_expert_gets_its_own_factors_at_the_expert_rank():
    config = LoRAConfig(rank=6)
    tensors = megatron_adapter(MOE, config, shared_experts=True)
    factors = to_hf(tensors, config, MOE)
    a = tensors["decoder.layers.1.mlp.experts.linear_fc1_lora.lora_A"]
    b = tensors["decoder.layers.1.mlp.experts.linear_fc1_lora.lora_B"]
    up = factors["model.layers.1.mlp.experts.11.up_proj"]
    assert torch.equal(up.lora_A, a[11, 3:])
    assert torch.equal(up.lora_B, b[11, 5:])
    assert (up.rank, up.scale) == (3, 32 / 3)
    assert factors["model.layers.1.mlp.shared_experts.up_proj"].rank == 6
    assert len(factors) == 2 * (4 + 3 + 12 * 3) + 1


CONFIGS = {
    "separate A": LoRAConfig(rank=4),
    "one A": LoRAConfig(rank=4, shared_a=True),
    "rslora": LoRAConfig(rank=6, alpha=7.0, rslora=True),
    "expert rank": LoRAConfig(rank=3, expert_rank=5),
    "shared outer": LoRAConfig(rank=4, expert_mode="shared_outer"),
    "shared outer, one A": LoRAConfig(rank=4, expert_mode="shared_outer", shared_a=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_there_and_back_is_the_same_bit_for_bit(shape, config):
    tensors = megatron_adapter(shape, config, shared_experts=True)
    factors = to_hf(tensors, config, shape)
    assert same(from_hf(factors, config, shape, padded_vocab_size=PADDED), tensors)


@pytest.mark.parametrize("format", ["peft", "peft-3d"])
def test_export_import_export_gives_identical_bytes(format, tmp_path: Path):
    config = LoRAConfig(rank=6, alpha=20.0)
    factors = to_hf(megatron_adapter(MOE, config), config, MOE)
    write_adapter(tmp_path / "a", factors, base_model_name="x", format=format)
    tensors = from_hf(read_adapter(tmp_path / "a"), config, MOE, padded_vocab_size=PADDED)
    assert same(tensors, megatron_adapter(MOE, config))
    again = to_hf(tensors, config, MOE)
    write_adapter(tmp_path / "b", again, base_model_name="x", format=format)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_uniform_format_comes_back_at_the_ranks_that_it_had(tmp_path: Path):
    config = LoRAConfig(rank=6)
    tensors = megatron_adapter(MOE, config)
    factors = to_hf(tensors, config, MOE)
    write_adapter(tmp_path / "a", factors, base_model_name="x", format="uniform")
    back = from_hf(read_adapter(tmp_path / "a"), config, MOE, padded_vocab_size=PADDED)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=3e-7, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    d=st.integers(1, 4),
    topk=st.integers(1, 3),
    expert_rank=st.integers(1, 3),
    alpha=st.sampled_from([1.0, 16.0, 32.0, 7.3]),
    shared_a=st.booleans(),
    outer=st.booleans(),
)
def test_any_shape_goes_there_and_back(
    groups, heads_per_group, d, topk, expert_rank, alpha, shared_a, outer
):
    shape = ModelShape(
        num_layers=1,
        hidden_size=6,
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        kv_channels=d,
        vocab_size=PADDED - groups,
        num_moe_experts=topk + 10,
        moe_router_topk=topk,
        moe_ffn_hidden_size=4,
    )
    mode = "shared_outer" if outer else "per_expert"
    config = LoRAConfig(rank=topk * expert_rank, alpha=alpha, shared_a=shared_a, expert_mode=mode)
    tensors = megatron_adapter(shape, config)
    factors = to_hf(tensors, config, shape)
    assert same(from_hf(factors, config, shape, padded_vocab_size=PADDED), tensors)
    qkv = "decoder.layers.0.self_attention.linear_qkv_lora"
    rows = head_by_head(tensors[f"{qkv}.lora_B"], shape)
    for name, b in rows.items():
        assert torch.equal(factors[f"model.layers.0.self_attn.{name}"].lora_B, b)


def test_the_tinker_format_holds_shared_outer_experts_bit_for_bit(tmp_path):
    config = LoRAConfig(rank=4, expert_mode="shared_outer")
    tensors = megatron_adapter(MOE, config)
    factors = to_hf(tensors, config, MOE)
    write_adapter(tmp_path / "a", factors, base_model_name="x", format="tinker")
    read = read_adapter(tmp_path / "a")
    assert same(from_hf(read, config, MOE, padded_vocab_size=PADDED), tensors)


def test_modules_without_a_hugging_face_name_are_refused():
    tensors = {
        "decoder.layers.0.eh_proj_lora.lora_A": torch.ones(4, 12),
        "decoder.layers.0.eh_proj_lora.lora_B": torch.ones(12, 4),
    }
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.eh_proj has no adapter"):
        to_hf(tensors, LoRAConfig(rank=4), MOE)


def test_gates_among_the_queries_are_refused() -> None:
    tensors = {
        "decoder.layers.0.self_attention.linear_qkv_lora.lora_A": torch.ones(6, 12),
        "decoder.layers.0.self_attention.linear_qkv_lora.lora_B": torch.ones(90, 2),
    }
    shape = replace(DENSE, attention_output_gate=True)
    assert shape.qkv_rows == 90
    with pytest.raises(ValueError, match="q_proj: attention_output_gate is set"):
        to_hf(tensors, LoRAConfig(rank=2), shape)


def test_the_configuration_of_another_adapter_is_refused():
    tensors = megatron_adapter(DENSE, LoRAConfig(rank=4))
    with pytest.raises(ValueError, match="belongs to another adapter"):
        to_hf(tensors, LoRAConfig(rank=8), DENSE)


def test_a_pissa_adapter_is_exported_as_the_difference_from_its_start():
    config = LoRAConfig(rank=4, init="pissa")
    tensors = megatron_adapter(DENSE, config)
    start = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="pissa"):
        to_hf(tensors, config, DENSE)
    factors = to_hf(tensors, config, DENSE, initial=start)
    plain = LoRAConfig(rank=4)
    now, then = to_hf(tensors, plain, DENSE), to_hf(start, plain, DENSE)
    for name, module in factors.items():
        torch.testing.assert_close(module.delta(), now[name].delta() - then[name].delta())
