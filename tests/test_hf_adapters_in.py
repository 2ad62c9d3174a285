"""Other people's adapters, fitted to ours: lower ranks, other scales, and what does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.factors import LoRAFactors
from megalora.hf.offline import infer_config
from tests.support.full_adapters import DENSE, MOE, PADDED, megatron_adapter


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


def test_a_router_takes_the_adapter_of_its_gate_and_says_by_which_flag():
    name = "model.layers.1.mlp.gate"
    given = third_party(name, 4, 12, 12)
    with pytest.raises(ValueError, match=r"gate: add .* --lora-targets all mlp\.router$"):
        from_hf(given, LoRAConfig(rank=4), MOE)
    imported = infer_config(given, MOE)
    assert to_hf(from_hf(given, imported, MOE), imported, MOE).keys() == given.keys()
    config = LoRAConfig(rank=4, targets=("all", "router"))
    back = to_hf(from_hf(given, config, MOE), config, MOE)
    assert torch.equal(back[name].lora_A, given[name].lora_A)
    torch.testing.assert_close(back[name].delta(), given[name].delta())
    with pytest.raises(ValueError, match=r"gate 11 do not fit the model's \[12\] rows"):
        from_hf(third_party(name, 4, 12, 11), config, MOE)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.down_proj",
    ],
)
def test_layers_have_either_experts_or_a_dense_mlp(name):
    mixed = replace(MOE, moe_layer_freq=(0, 1))
    with pytest.raises(ValueError, match=name):
        from_hf(third_party(name, 2, 12, 5), LoRAConfig(rank=4, targets=("all", "router")), mixed)


def test_an_import_shares_what_the_experts_share_and_nothing_else():
    outer = LoRAConfig(rank=4, expert_mode="shared_outer")
    tensors = megatron_adapter(MOE, outer)
    factors = to_hf(tensors, outer, MOE)
    config = infer_config(factors, MOE)
    assert (config.expert_mode, config.rank, config.expert_rank) == ("shared_outer", 4, 4)
    again = from_hf(factors, config, MOE, padded_vocab_size=PADDED)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    name = "model.layers.1.mlp.experts.7.down_proj"
    scaled = {**factors, name: replace(factors[name], scale=3.0)}
    separate = {**factors, name: replace(factors[name], lora_B=factors[name].lora_B + 1)}
    some = {n: m for n, m in factors.items() if "experts" not in n or n == name}
    for others in (scaled, separate, some):
        assert infer_config(others, MOE).expert_mode == "per_expert"
