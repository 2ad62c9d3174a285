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
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter, write_adapter
from megalora.model.shape import ModelShape

DENSE = ModelShape(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=5,
    vocab_size=11,
    ffn_hidden_size=7,
)
MOE = ModelShape(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=11,
    num_moe_experts=12,
    moe_router_topk=2,
    moe_ffn_hidden_size=5,
)
PADDED = 16


def megatron_adapter(shape: ModelShape, config: LoRAConfig, *, shared_experts: bool = False):
    """Return random full adapter tensors as Megatron's side hands them over."""
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    h, r = shape.hidden_size, config.rank
    tensors: dict[str, Tensor] = {}

    def linear(name: str, count: int, num_in: int, num_out: int, rank: int = r) -> None:
        count = 1 if config.shared_a else count
        tensors[f"{name}_lora.lora_A"] = randn(count * rank, num_in)
        tensors[f"{name}_lora.lora_B"] = randn(num_out, rank)

    def mlp(name: str, ffn: int) -> None:
        linear(f"{name}.linear_fc1", 2, h, 2 * ffn)
        linear(f"{name}.linear_fc2", 1, ffn, h)

    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}"
        linear(f"{prefix}.self_attention.linear_qkv", 3, h, shape.qkv_rows)
        heads = shape.num_attention_heads * shape.kv_channels
        linear(f"{prefix}.self_attention.linear_proj", 1, heads, h)
        if not shape.num_moe_experts:
            mlp(f"{prefix}.mlp", shape.ffn_hidden_size)
            continue
        if shared_experts:
            mlp(f"{prefix}.mlp.shared_experts", 9)
        num, ffn = shape.num_moe_experts, shape.moe_ffn_hidden_size
        rank = config.resolve_expert_rank(shape.moe_router_topk)
        count = 1 if config.shared_a else 2
        outer = config.expert_mode == "shared_outer"
        fc1, fc2 = f"{prefix}.mlp.experts.linear_fc1_lora", f"{prefix}.mlp.experts.linear_fc2_lora"
        every = () if outer else (num,)
        tensors[f"{fc1}.lora_A"] = randn(*every, count * rank, h)
        tensors[f"{fc1}.lora_B"] = randn(num, 2 * ffn, rank)
        tensors[f"{fc2}.lora_A"] = randn(num, rank, ffn)
        tensors[f"{fc2}.lora_B"] = randn(*every, h, rank)
    linear("output_layer", 1, h, PADDED)
    tensors["output_layer_lora.lora_B"][shape.vocab_size :] = 0
    return tensors


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
    assert factors["model.layers.1.mlp.shared_expert.up_proj"].rank == 6
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


def third_party(name: str, rank: int, num_in: int, num_out: int, scale: float = 1.5):
    generator = torch.Generator().manual_seed(len(name))
    a = torch.randn(rank, num_in, generator=generator)
    b = torch.randn(num_out, rank, generator=generator)
    return {name: LoRAFactors(a, b, scale)}


def test_a_lower_rank_and_another_scale_keep_the_update():
    config = LoRAConfig(rank=8)
    name = "model.layers.0.self_attn.k_proj"
    given = third_party(name, 3, 12, 15)
    back = to_hf(from_hf(given, config, DENSE), config, DENSE)
    assert back[name].rank == 8
    assert back[name].scale == 4
    torch.testing.assert_close(back[name].delta(), given[name].delta())
    assert not back["model.layers.0.self_attn.q_proj"].lora_A.any()
    assert not back["model.layers.0.self_attn.q_proj"].lora_B.any()


def test_what_is_filled_can_start_fresh_without_changing_the_update():
    config = LoRAConfig(rank=8)
    name = "model.layers.0.self_attn.k_proj"
    given = third_party(name, 3, 12, 15)

    def ones(_name: str, shape: tuple[int, ...], _seed: int) -> Tensor:
        return torch.ones(shape)

    back = to_hf(from_hf(given, config, DENSE, fresh_a=ones), config, DENSE)
    torch.testing.assert_close(back[name].delta(), given[name].delta())
    assert torch.equal(back[name].lora_A[3:], torch.ones(5, 12))
    query = back["model.layers.0.self_attn.q_proj"]
    assert torch.equal(query.lora_A, torch.ones(8, 12))
    assert not query.lora_B.any()


def test_start_values_are_drawn_under_the_names_that_the_adapters_have():
    config = LoRAConfig(rank=4)
    asked = []

    def fresh(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        asked.append((name, shape, seed))
        return torch.zeros(shape)

    factors = third_party("model.layers.1.mlp.experts.3.up_proj", 2, 12, 5)
    from_hf(factors, config, MOE, fresh_a=fresh)
    names = {name for name, _, _ in asked}
    assert names == {f"decoder.layers.1.mlp.experts.linear_fc1_lora.{e}" for e in range(12)}
    assert {(shape, seed) for _, shape, seed in asked} == {((4, 12), 1234)}


@pytest.mark.parametrize(
    ("name", "rank", "num_in", "num_out", "flag"),
    [
        ("model.layers.0.self_attn.o_proj", 9, 12, 12, "--lora-rank 9"),
        ("model.layers.0.mlp.experts.1.down_proj", 5, 5, 12, "--lora-expert-rank 5"),
    ],
)
def test_a_higher_rank_is_refused_with_the_rank_to_use(name, rank, num_in, num_out, flag):
    with pytest.raises(ValueError, match=flag):
        from_hf(third_party(name, rank, num_in, num_out), LoRAConfig(rank=8), MOE)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.self_attn.qkv_proj",
        "model.embed_tokens",
        "model.language_model.layers.0.mlp.up_proj",
    ],
)
def test_a_module_of_another_model_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        from_hf(third_party(name, 2, 12, 7), LoRAConfig(rank=8), DENSE)


def test_sizes_of_another_model_are_refused():
    with pytest.raises(ValueError, match="q_proj 15"):
        from_hf(
            third_party("model.layers.0.self_attn.q_proj", 2, 12, 15), LoRAConfig(rank=8), DENSE
        )


def test_a_module_outside_of_the_targets_is_refused_by_name():
    config = LoRAConfig(rank=8, targets=("mlp",))
    with pytest.raises(ValueError, match=r"o_proj: add them to --lora-targets"):
        from_hf(third_party("model.layers.0.self_attn.o_proj", 2, 30, 12), config, DENSE)


def test_separate_factors_do_not_fit_shared_ones():
    config = LoRAConfig(rank=4)
    factors = to_hf(megatron_adapter(MOE, config), config, MOE)
    with pytest.raises(ValueError, match="shared_a"):
        from_hf(factors, LoRAConfig(rank=4, shared_a=True, expert_rank=2), MOE)
    outer = LoRAConfig(rank=4, expert_mode="shared_outer")
    with pytest.raises(ValueError, match="per_expert"):
        from_hf(factors, outer, MOE)


def test_shared_factors_fit_separate_ones():
    one = LoRAConfig(rank=4, shared_a=True, expert_mode="shared_outer")
    factors = to_hf(megatron_adapter(MOE, one), one, MOE)
    separate = LoRAConfig(rank=4, expert_rank=4)
    back = to_hf(from_hf(factors, separate, MOE), separate, MOE)
    assert factors.keys() == back.keys()
    for name, module in factors.items():
        assert torch.equal(module.delta(), back[name].delta())


def test_modules_without_a_hugging_face_name_are_refused():
    tensors = {
        "decoder.layers.0.mlp.router_lora.lora_A": torch.ones(4, 12),
        "decoder.layers.0.mlp.router_lora.lora_B": torch.ones(12, 4),
    }
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.router has no adapter"):
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
