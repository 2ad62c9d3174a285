"""Parameters and FLOPs of adapters, against the article, transformers and hand counts."""

from typing import Any

import pytest

from megalora.model.config_json import model_shape
from megalora.model.presets import preset_shape
from megalora.model.shape import ModelShape
from megalora.recommend import (
    adapter_parameters,
    step_flops,
)
from tests.support.sizes import LLAMA, MOE, TINY_LLAMA, TINY_MOE, lora, trainable


def test_llama_parameters_for_each_rank_are_the_articles() -> None:
    per_rank = {"attention": 851_968, "mlp": 1_769_472, "unembedding": 132_352}
    assert adapter_parameters(LLAMA, lora(1)) == per_rank
    assert adapter_parameters(LLAMA, lora(16)) == {k: 16 * v for k, v in per_rank.items()}


@pytest.mark.parametrize(
    ("rank", "targets", "billions"),
    [
        (256, ("mlp", "unembed"), 0.49),
        (256, ("attn", "unembed"), 0.25),
        (256, ("all",), 0.70),
        (128, ("mlp", "unembed"), 0.24),
    ],
)
def test_the_articles_table_is_reproduced(
    rank: int, targets: tuple[str, ...], billions: float
) -> None:
    # The article prints two decimals; its .70 is .7048.
    assert trainable(LLAMA, lora(rank, targets=targets)) / 1e9 == pytest.approx(billions, abs=5e-3)


@pytest.mark.parametrize(
    ("rank", "parameters"), [(8, 59_821_056), (32, 239_284_224), (256, 1_914_273_792)]
)
def test_experts_of_qwen_have_a_topk_th_of_the_rank(rank: int, parameters: int) -> None:
    assert trainable(MOE, lora(rank)) == parameters


def test_shared_outer_experts_are_counted_at_full_rank() -> None:
    config = lora(4, expert_mode="shared_outer")
    assert adapter_parameters(MOE, config)["experts"] == 4 * 14_450_688


@pytest.mark.parametrize(
    ("preset", "published"), [("deepseek-v3", 61 * 40_000), ("kimi-k2", 61 * 31_808)]
)
def test_tinkers_attention_through_latents_is_what_it_publishes(
    preset: str, published: int
) -> None:
    shape, shared = preset_shape(preset), {"expert_mode": "shared_outer"}
    tinker = lora(1, targets=("tinker",), **shared)
    assert adapter_parameters(shape, tinker)["attention"] == published
    # Of q_b: 1536 in, 192 a head out; of kv_b: 512 in, 256 a head out.
    expanding = 61 * (1536 + 512 + shape.num_attention_heads * (192 + 256))
    assert adapter_parameters(shape, lora(1, **shared))["attention"] == published + expanding


def test_tinkers_attention_of_delta_nets_is_what_it_publishes() -> None:
    # Qwen3.5-27B: three of four layers are delta nets, the others attend with an output gate.
    shape = ModelShape(
        num_layers=64,
        hidden_size=5120,
        num_attention_heads=24,
        num_query_groups=4,
        kv_channels=256,
        ffn_hidden_size=17408,
        vocab_size=248320,
        attention_output_gate=True,
        linear_attention_freq=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
    )
    assert adapter_parameters(shape, lora(1))["attention"] == 2_965_504
    gates = adapter_parameters(shape, lora(1, delta_gates=True))["attention"] - 2_965_504
    # Two projections of 48 rows in each of 48 layers.
    assert gates == 48 * 2 * (5120 + 48)


def test_tinkers_experts_are_what_it_publishes() -> None:
    tinker = lora(1, targets=("tinker",), expert_mode="shared_outer")
    counts = adapter_parameters(MOE, tinker)
    assert counts["experts"] == 14_450_688
    assert counts == adapter_parameters(MOE, lora(1, expert_mode="shared_outer"))


def test_shared_a_saves_the_a_of_all_but_one_projection() -> None:
    # Each layer has q, k, v and gate, up: three A of linears that read hidden are saved.
    saved = trainable(LLAMA, lora(8)) - trainable(LLAMA, lora(8, shared_a=True))
    assert saved == 32 * 3 * 8 * 4096


def test_an_expert_rank_of_its_own_leaves_dense_adapters_alone() -> None:
    small, large = lora(32, expert_rank=1), lora(32, expert_rank=5)
    counts = [adapter_parameters(MOE, config) for config in (small, large)]
    assert counts[1] == {**counts[0], "experts": 5 * counts[0]["experts"]}


def test_the_router_is_counted_only_where_it_is_named() -> None:
    assert "router" not in adapter_parameters(MOE, lora(8))
    assert adapter_parameters(MOE, lora(8, targets=("router",))) == {
        "router": 48 * 8 * (2048 + 128)
    }


def test_a_target_by_layer_counts_that_layer_alone() -> None:
    config = lora(8, targets=("decoder.layers.3.*",))
    per_layer = 8 * (851_968 + 1_769_472) // 32
    assert trainable(LLAMA, config) == per_layer


def test_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="match no module"):
        adapter_parameters(LLAMA, lora(8, targets=("all", "shared_experts.linear_fc1")))


def square_model(width: int) -> ModelShape:
    """Return a model whose linears but the unembedding are all width x width."""
    return ModelShape(
        name="square",
        family="",
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        num_query_groups=1,
        kv_channels=width,
        ffn_hidden_size=width,
        vocab_size=width,
    )


@pytest.mark.parametrize(("rank", "ratio"), [(32, 0.682), (256, 0.792)])
def test_square_weights_cost_what_the_articles_formula_says(rank: int, ratio: float) -> None:
    n = 4096
    flops = step_flops(square_model(n), lora(rank))
    assert flops.ratio == pytest.approx((2 * n * n + 6 * n * rank) / (3 * n * n), rel=1e-12)
    assert flops.ratio == pytest.approx(ratio, abs=5e-4)


def counted_matmul_flops(model: Any, batch: Any) -> int:
    """Count the FLOPs of all matrix products of a step but those inside attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    linears = {"aten.mm", "aten.addmm"}
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in linears)


def test_step_flops_are_what_torch_counts_on_a_real_model() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    import torch

    fields = {name: value for name, value in TINY_LLAMA.items() if name != "model_type"}
    config = transformers.LlamaConfig(**fields, attn_implementation="eager")
    tokens = torch.randint(0, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    base = transformers.LlamaForCausalLM(config)
    full = counted_matmul_flops(base, batch)
    # Megatron's embedding is frozen too, but layer 0 is counted with its dX.
    base.enable_input_require_grads()
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=r".*(_proj|lm_head)", lora_alpha=32)
    )
    flops = step_flops(model_shape(TINY_LLAMA), lora(4))
    assert flops.full * tokens.numel() == full
    assert flops.lora * tokens.numel() == counted_matmul_flops(adapted, batch)


def test_experts_count_once_for_each_of_the_topk() -> None:
    shape = model_shape({**TINY_MOE, "mlp_only_layers": []})
    attention, experts = 32 * 64 + 32 * 32, 2 * 3 * 32 * 24
    assert step_flops(shape, lora(4)).full == 6 * (2 * (attention + experts + 32 * 4) + 32 * 80)


def test_nothing_is_computed_backward_below_the_first_adapter() -> None:
    flops = step_flops(square_model(64), lora(8, targets=("unembed",)))
    # q, k, v, o and the three of the MLP only forward; the unembedding also dX and an adapter.
    assert flops.lora == 7 * 2 * 64**2 + 4 * 64**2 + 6 * 8 * (64 + 64)
