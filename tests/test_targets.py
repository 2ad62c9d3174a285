"""Which modules get which adapter, and how a rank's output columns map to projections."""

import dataclasses
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.targets import (
    AdapterSpec,
    ModelFacts,
    Rows,
    check_all_matched,
    check_targets,
    global_name,
    matching_target,
    plan,
)

LAYER = "decoder.layers.3"
FACTS = ModelFacts(
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    gated_linear_unit=True,
    moe_router_topk=2,
    num_moe_experts=4,
    q_lora_rank=16,
)
QKV, FC1, FC2 = (
    f"{LAYER}.self_attention.linear_qkv",
    f"{LAYER}.mlp.linear_fc1",
    f"{LAYER}.mlp.linear_fc2",
)
EXPERT_FC1 = f"{LAYER}.mlp.experts.linear_fc1"


def spec(name: str, out: int, *, is_expert: bool = False, **fields: Any) -> AdapterSpec:
    config = LoRAConfig(**{"rank": 4, **fields})
    return plan(name, out, config, FACTS, is_expert=is_expert)


@pytest.mark.parametrize(
    ("target", "matched", "others"),
    [
        ("all", [QKV, FC1, EXPERT_FC1, "output_layer"], [f"{LAYER}.mlp.router"]),
        ("attn", [QKV, f"{LAYER}.self_attention.linear_kv_up_proj"], [FC1, "output_layer"]),
        ("mlp", [FC1, FC2, EXPERT_FC1, f"{LAYER}.mlp.shared_experts.linear_fc1"], [QKV]),
        ("mamba", [f"{LAYER}.mixer.in_proj", f"{LAYER}.mixer.out_proj"], [QKV, FC2]),
        ("all", [f"{LAYER}.mixer.in_proj"], [f"{LAYER}.mixer.conv1d"]),
        ("unembed", ["output_layer"], [FC1, "embedding.output_layer_norm"]),
        ("router", [f"{LAYER}.mlp.router"], [QKV]),
        ("shared_experts.linear_fc1", [f"{LAYER}.mlp.shared_experts.linear_fc1"], [FC1]),
        ("decoder.layers.3.*", [QKV, FC1], ["decoder.layers.30.mlp.linear_fc1", "output_layer"]),
        (FC1, [FC1], [FC2, "decoder.layers.13.mlp.linear_fc1x"]),
    ],
)
def test_a_target_selects_its_modules(target: str, matched: list[str], others: list[str]) -> None:
    assert all(matching_target(name, (target,)) == target for name in matched)
    assert all(matching_target(name, (target,)) is None for name in others)


def test_an_unknown_target_is_refused_with_those_that_work() -> None:
    check_targets(["all", "linear_qkv", "experts.linear_fc1", "decoder.layers.*"])
    with pytest.raises(ValueError, match=r"lora_targets has 'q_proj'.*presets.*linear_qkv"):
        check_targets(["all", "q_proj"])


def test_a_target_that_matches_nothing_is_an_error() -> None:
    check_all_matched(["attn", "mlp"], ["mlp", "attn"], ["linear_qkv", "linear_fc1"])
    with pytest.raises(ValueError, match=r"\['attn'\] match no module.* are in_proj, out_proj\."):
        check_all_matched(["attn", "mamba"], ["mamba"], ["out_proj", "in_proj"])


def test_a_model_without_linears_is_an_error() -> None:
    with pytest.raises(ValueError, match="none that an adapter could go to: leave --lora-rank out"):
        check_all_matched(["all"], [], [])


def test_each_hugging_face_projection_has_its_own_a() -> None:
    assert spec(QKV, 128).rows == Rows(blocks=(128,), period=(16, 8, 8))
    assert spec(QKV, 128).num_projections == 3
    assert spec(FC1, 96).rows == Rows(blocks=(48, 48), period=(48, 48))
    assert spec(FC2, 32).num_projections == 1
    assert spec("output_layer", 64).rows == Rows(blocks=(64,), padded=True)


def test_one_a_for_a_fused_linear_on_request() -> None:
    shared = spec(QKV, 128, shared_a=True)
    assert (shared.rows.period, shared.num_projections) == ((), 1)
    gated = spec(FC1, 96, shared_a=True).rows
    assert gated == Rows(blocks=(48, 48)), "its output is still split as gate and up"


def test_rows_of_an_output_gate_belong_to_the_query() -> None:
    facts = dataclasses.replace(FACTS, attention_output_gate=True)
    gated = plan(QKV, 192, LoRAConfig(rank=4), facts, is_expert=False)
    assert gated.rows.period == (32, 8, 8)


def test_the_joint_down_projection_of_latent_attention_has_two_projections() -> None:
    name = f"{LAYER}.self_attention.linear_qkv_down_proj"
    assert spec(name, 40).rows.period == (16, 24)


def test_experts_share_the_rank_of_one_token() -> None:
    expert = spec(EXPERT_FC1, 48, is_expert=True, alpha=8.0)
    assert (expert.rank, expert.scale) == (2, 4.0)
    assert not expert.shared_a
    assert not expert.shared_b


def test_shared_outer_shares_the_outer_factors() -> None:
    fields: dict[str, Any] = {"expert_mode": "shared_outer", "is_expert": True, "alpha": 8.0}
    fc1, fc2 = spec(EXPERT_FC1, 48, **fields), spec(f"{LAYER}.mlp.experts.linear_fc2", 32, **fields)
    assert (fc1.shared_a, fc1.shared_b) == (True, False)
    assert (fc2.shared_a, fc2.shared_b) == (False, True)
    assert (fc1.rank, fc1.scale) == (4, 2.0)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_with_whole_query_groups_repeat_the_period(tp_size: int) -> None:
    rows = Rows(blocks=(128,), period=(16, 8, 8))
    assert all(rows.segments(tp_rank, tp_size) == [16, 8, 8] for tp_rank in range(tp_size))


@pytest.mark.parametrize(("groups", "tp_size"), [(1, 2), (1, 4), (2, 4), (2, 8), (4, 4)])
def test_ranks_with_parts_of_a_query_group_own_every_column_once(groups: int, tp_size: int) -> None:
    period = (32, 8, 8)
    whole = [p for _ in range(groups) for p, size in enumerate(period) for _ in range(size)]
    columns: list[int] = []
    for tp_rank in range(tp_size):
        local = Rows(blocks=(48 * groups,), period=period).segments(tp_rank, tp_size)
        columns += [p for p, size in enumerate(local) for _ in range(size)]
    assert columns == whole


def test_columns_across_query_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="cross a query group of 48 columns"):
        Rows(blocks=(48 * 2,), period=(32, 8, 8)).segments(1, 3)


def test_a_rank_of_a_gated_linear_owns_a_part_of_gate_and_of_up() -> None:
    assert Rows(blocks=(48, 48), period=(48, 48)).segments(1, 4) == [12, 12]


def test_layer_numbers_become_global() -> None:
    numbers = {"decoder.layers.0": 5, "decoder.layers.10": 15}
    assert global_name("decoder.layers.0.mlp.linear_fc1", numbers) == (
        "decoder.layers.4.mlp.linear_fc1"
    )
    assert global_name("decoder.layers.10", numbers) == "decoder.layers.14"
    assert global_name("decoder.layers.1.mlp", numbers) == "decoder.layers.1.mlp"
    assert global_name("output_layer", numbers) == "output_layer"
    assert global_name("mtp.layers.0.eh_proj", numbers) == "mtp.layers.0.eh_proj"
