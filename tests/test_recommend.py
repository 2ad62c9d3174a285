"""Recommendations: shapes, counts, FLOPs, rates, capacity, memory and the command line."""

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.recommend import (
    Layout,
    ModelShape,
    Recommendation,
    adapter_parameters,
    add_parser,
    gpu_memory,
    learning_rates,
    recommend,
    recommend_for_args,
    step_flops,
)
from megalora.recommend.rules import two_number_basis

LLAMA = ModelShape.from_preset("llama-3.1-8b")
MOE = ModelShape.from_preset("qwen3-30b-a3b")
TINY_LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 80,
    "tie_word_embeddings": False,
}
TINY_MOE = {
    **TINY_LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}
TINY_QWEN2_MOE = {
    **TINY_MOE,
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 40,
}


def lora(rank: int = 8, **fields: Any) -> LoRAConfig:
    return LoRAConfig(rank=rank, **fields)


def trainable(shape: ModelShape, config: LoRAConfig) -> int:
    return sum(adapter_parameters(shape, config).values())


# --- shapes


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, published: int) -> None:
    assert ModelShape.from_preset(preset).base_parameters == published


@pytest.mark.parametrize(
    "config",
    [
        TINY_LLAMA,
        {**TINY_LLAMA, "tie_word_embeddings": True},
        {**TINY_LLAMA, "model_type": "mistral"},
        {**TINY_LLAMA, "model_type": "qwen2"},
        {**TINY_LLAMA, "model_type": "qwen3"},
        {**TINY_LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        TINY_MOE,
        {**TINY_MOE, "mlp_only_layers": [], "decoder_sparse_step": 2, "num_hidden_layers": 3},
        TINY_QWEN2_MOE,
    ],
    ids=lambda config: config["model_type"],
)
def test_a_hugging_face_config_counts_what_transformers_builds(config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    fields = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **fields)
        )
    # A tied weight is one parameter.
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.from_hf_config(config).base_parameters == expected


def test_a_folder_is_read_like_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_MOE))
    from_folder = ModelShape.from_name(str(tmp_path))
    from_content = ModelShape.from_hf_config(TINY_MOE, name=tmp_path.name)
    assert from_folder == from_content


MEGATRON_LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
}


def test_megatron_flags_give_the_shape_and_family_of_the_preset_that_they_spell() -> None:
    assert ModelShape.from_megatron_args(SimpleNamespace(**MEGATRON_LLAMA)) == LLAMA


def test_megatron_flags_of_no_preset_have_no_family() -> None:
    other = {**MEGATRON_LLAMA, "num_layers": 31}
    assert ModelShape.from_megatron_args(SimpleNamespace(**other)).family == ""


@pytest.mark.parametrize(("freq", "dense"), [(2, (1, 3)), ([0, 1, 1, 1], (0,)), (1, ())])
def test_moe_layer_freq_decides_which_layers_are_dense(freq: Any, dense: tuple[int, ...]) -> None:
    args = {**MEGATRON_LLAMA, "num_layers": 4, "num_experts": 8, "moe_router_topk": 2}
    shape = ModelShape.from_megatron_args(SimpleNamespace(**args, moe_layer_freq=freq))
    assert shape.dense_layers == dense


def test_megatron_defaults_fill_in_what_flags_leave_out() -> None:
    args = SimpleNamespace(num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=100)
    shape = ModelShape.from_megatron_args(args)
    assert (shape.ffn_hidden_size, shape.kv_channels, shape.num_query_groups) == (256, 16, 4)
    assert shape.tied
    assert not shape.gated


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelShape.from_preset("llama-9"), r"'llama-9' is neither .* llama-3.1-8b"),
        (lambda: ModelShape.from_hf_config({"model_type": "deepseek_v3"}), "MLA"),
        (lambda: ModelShape.from_hf_config({"model_type": "llama"}), "no 'num_attention_heads'"),
        (lambda: ModelShape.from_hf_config("/nonexistent"), "no config.json"),
        (
            lambda: ModelShape.from_megatron_args(SimpleNamespace(multi_latent_attention=True)),
            "multi_latent_attention",
        ),
        (lambda: ModelShape.from_megatron_args(SimpleNamespace(num_layers=2)), "--hidden-size"),
    ],
)
def test_a_model_that_cannot_be_described_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- parameters, against FACTS of the article and hand counts


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


# --- FLOPs


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
    flops = step_flops(ModelShape.from_hf_config(TINY_LLAMA), lora(4))
    assert flops.full * tokens.numel() == full
    assert flops.lora * tokens.numel() == counted_matmul_flops(adapted, batch)


def test_experts_count_once_for_each_of_the_topk() -> None:
    shape = ModelShape.from_hf_config({**TINY_MOE, "mlp_only_layers": []})
    attention, experts = 32 * 64 + 32 * 32, 2 * 3 * 32 * 24
    assert step_flops(shape, lora(4)).full == 6 * (2 * (attention + experts + 32 * 4) + 32 * 80)


def test_nothing_is_computed_backward_below_the_first_adapter() -> None:
    flops = step_flops(square_model(64), lora(8, targets=("unembed",)))
    # q, k, v, o and the three of the MLP only forward; the unembedding also dX and an adapter.
    assert flops.lora == 7 * 2 * 64**2 + 4 * 64**2 + 6 * 8 * (64 + 64)


# --- learning rates


@pytest.mark.parametrize(
    ("preset", "rate"),
    [
        ("llama-3.2-1b", 4.91e-4),
        ("llama-3.1-8b", 2.86e-4),
        ("llama-3.1-70b", 1.66e-4),
        ("qwen3-8b", 4.73e-4),
        ("qwen3-30b-a3b", 4.99e-4),
    ],
)
def test_rates_are_the_articles(preset: str, rate: float) -> None:
    result = recommend(ModelShape.from_preset(preset), lora(8))
    assert result.learning_rate == pytest.approx(rate, rel=2e-3)
    assert result.rates.full[0] == pytest.approx(result.learning_rate / 10)


def test_runs_of_fewer_than_a_hundred_steps_get_fifteen_times() -> None:
    short, long = (learning_rates(4096, "llama", steps=steps) for steps in (99, 100))
    assert short.lora[0] == pytest.approx(1.5 * long.lora[0])
    assert short.full == long.full


def test_the_rate_does_not_depend_on_the_rank() -> None:
    assert recommend(LLAMA, lora(4)).learning_rate == recommend(LLAMA, lora(512)).learning_rate


def test_an_unknown_family_gets_a_range_and_is_told_so() -> None:
    unknown = dataclasses.replace(LLAMA, family="mistral")
    result = recommend(unknown, lora(8))
    low, high = result.rates.lora
    assert (low, high) == pytest.approx((2.86e-4, 4.73e-4), rel=2e-3)
    assert result.basis is None
    assert any("not to mistral" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"mistral.*sweep"):
        _ = result.learning_rate


# --- capacity


def test_two_bits_for_each_parameter_bound_the_tokens() -> None:
    bits = 2 * trainable(LLAMA, lora(8))
    fits = recommend(LLAMA, lora(8), tokens=bits).capacity
    too_much = recommend(LLAMA, lora(8), tokens=bits + 1).capacity
    assert fits is not None
    assert too_much is not None
    assert (fits.low_regret, fits.rank_needed) == (True, 8)
    assert (too_much.low_regret, too_much.rank_needed) == (False, 16)


def test_the_first_epochs_loss_is_a_bound_in_nats() -> None:
    capacity = recommend(LLAMA, lora(8), first_epoch_nats=1000.0).capacity
    assert capacity is not None
    assert capacity.data_bits == pytest.approx(1442.695)


def test_reinforcement_learning_needs_the_smallest_rank() -> None:
    dense, experts = (recommend(s, lora(32), rl_episodes=10**6).capacity for s in (LLAMA, MOE))
    assert dense is not None
    assert experts is not None
    assert dense.rank_needed == 1
    assert experts.rank_needed == 8, "per-expert ranks need a multiple of top-k"


def test_data_beyond_any_rank_calls_for_full_fine_tuning() -> None:
    result = recommend(LLAMA, lora(8), tokens=10**12)
    assert result.capacity is not None
    assert result.capacity.rank_needed is None
    assert any("full fine-tuning" in note for note in result.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"rl_episodes": 5, "tokens": 5}, "one by one"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_impossible_runs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommend(LLAMA, lora(8), **fields)


def test_large_batches_are_warned_of_in_supervised_training_only() -> None:
    def warned(**fields: Any) -> bool:
        return any("batch size" in note for note in recommend(LLAMA, lora(8), **fields).notes)

    assert warned(batch_size=33)
    assert not warned(batch_size=32)
    assert not warned(batch_size=256, rl_episodes=1000)


# --- the two-number basis


def test_the_basis_does_not_move_along_the_articles_invariance() -> None:
    q = 4.0
    plain = two_number_basis(lora(8, alpha=32), 2048, 1e-4)
    moved = two_number_basis(lora(8, alpha=32 / q, lr_ratio=q), 2048, 1e-4)
    control = two_number_basis(lora(8, alpha=32 / q), 2048, 1e-4)
    assert moved == pytest.approx(plain, rel=1e-12)
    assert control != pytest.approx(plain, rel=0.1)


def test_another_alpha_comes_with_the_ratio_that_trains_alike() -> None:
    notes = recommend(LLAMA, lora(8, alpha=64)).notes
    assert any("--lora-lr-ratio 0.5" in note for note in notes)
    assert not any("ratio" in n for n in recommend(LLAMA, lora(8, alpha=64, lr_ratio=0.5)).notes)


def test_rslora_counts_as_a_larger_alpha() -> None:
    notes = recommend(LLAMA, lora(16, rslora=True)).notes
    assert any("alpha is 128" in note for note in notes)


# --- memory


def test_full_fine_tuning_takes_eighteen_bytes_for_each_parameter_on_one_gpu() -> None:
    memory = gpu_memory(LLAMA, None, Layout())
    assert memory.total == 18 * LLAMA.base_parameters


def test_lora_takes_two_bytes_for_the_base_and_eighteen_for_the_adapters() -> None:
    memory = gpu_memory(MOE, lora(32), Layout())
    assert memory.total == 2 * MOE.base_parameters + 18 * trainable(MOE, lora(32))


def test_adapters_are_divided_by_every_parallel_dimension() -> None:
    layout = Layout(tp=2, dp=4, ep=4, etp=2, pp=1)
    counts = adapter_parameters(MOE, lora(32))
    dense, experts = counts["attention"] + counts["unembedding"], counts["experts"]
    memory = gpu_memory(MOE, lora(32), layout)
    assert memory.gradients == 4 * (dense / 2 + experts / 8)
    # 8 GPUs hold each expert once and each dense weight four times.
    assert memory.optimizer == 12 * (dense / 8 + experts / 8)


def test_expert_factors_shared_by_all_are_on_every_expert_rank() -> None:
    config = lora(8, expert_mode="shared_outer", targets=("mlp",))
    memory = gpu_memory(MOE, config, Layout(dp=8, ep=8))
    shared = 8 * 48 * (2 * 2048 + 2048)
    own = 8 * 48 * 128 * (2 * 768 + 768)
    assert memory.gradients == 4 * (shared + own / 8)


def test_without_the_distributed_optimizer_every_copy_has_the_whole_state() -> None:
    layout = Layout(dp=4, distributed_optimizer=False)
    assert gpu_memory(LLAMA, None, layout).total == 18 * LLAMA.base_parameters


def test_pipeline_stages_split_the_layers_and_the_fullest_is_reported() -> None:
    layers, table = LLAMA.base_parameters - 2 * 128256 * 4096 - 4096, 128256 * 4096
    weights = gpu_memory(LLAMA, None, Layout(pp=4)).weights
    assert weights == 2 * (layers / 4 + table + 4096)


def test_a_tied_table_is_held_once_on_one_stage_and_on_both_ends_of_a_pipeline() -> None:
    tied = ModelShape.from_preset("llama-3.2-1b")
    assert gpu_memory(tied, None, Layout()).total == 18 * tied.base_parameters
    layers = tied.base_parameters - tied.vocab_size * 2048 - 2048
    weights = gpu_memory(tied, None, Layout(pp=2)).weights
    assert weights == 2 * (layers / 2 + tied.vocab_size * 2048 + 2048)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (LLAMA, {"tp": 3}, "tp 3 does not divide"),
        (LLAMA, {"dp": 2, "ep": 2}, "0 experts"),
        (LLAMA, {"pp": 33}, "pp 33 exceeds"),
        (MOE, {"ep": 8}, "ep 8 x etp 1 does not divide"),
        (MOE, {"ep": 3, "dp": 3}, "128 experts"),
        (MOE, {"tp": 0}, "tp is 0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    shape: ModelShape, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_memory(shape, lora(8), Layout(**sizes))


# --- a training run's arguments

RUN = {
    **MEGATRON_LLAMA,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 2,
    "use_distributed_optimizer": True,
    "world_size": 16,
    "global_batch_size": 32,
    "train_iters": 50,
}


def test_a_training_run_gets_what_the_function_says_for_its_flags() -> None:
    expected = recommend(
        LLAMA, lora(8), steps=50, batch_size=32, layout=Layout(tp=2, pp=2, dp=4, etp=2)
    )
    assert recommend_for_args(SimpleNamespace(**RUN), lora(8)) == expected
    assert expected.rates.multiplier == 15


def test_samples_are_counted_in_steps() -> None:
    args = SimpleNamespace(**{**RUN, "train_iters": None, "train_samples": 100 * 32})
    assert recommend_for_args(args, lora(8)).rates.multiplier == 10


def test_the_base_folder_of_a_run_tells_its_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, "model_type": "qwen3"}))
    args = SimpleNamespace(**{**RUN, "num_layers": 3, "hf_model": str(tmp_path)})
    assert recommend_for_args(args, lora(8)).rates.family == "qwen"


# --- output


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["recommend", *arguments])


def test_the_command_prints_the_functions_numbers_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = ("--tp", "4", "--ep", "8", "--etp", "1", "--dp", "2")
    args = command("--model", "qwen3-30b-a3b", "--rank", "32", "--tokens", "100", *layout, "--json")
    assert args.func(args) == 0
    printed = json.loads(capsys.readouterr().out)
    expected: Recommendation = recommend(
        MOE, lora(32), tokens=100, layout=Layout(tp=4, ep=8, etp=1, dp=2)
    )
    assert printed == json.loads(json.dumps(expected.to_dict()))
    assert printed["trainable_parameters"]["all"] == 239_284_224


def test_the_table_shows_the_rate_the_regime_and_the_notes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = command("--model", "llama-3.1-8b", "--rank", "32", "--tokens", "1000000000")
    args.func(args)
    printed = capsys.readouterr().out
    for part in ("2.86e-04", "88,121,344", "smallest rank 256", "note: rank 32 does not hold"):
        assert part in printed


def test_the_command_takes_megatron_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = []
    for name, value in MEGATRON_LLAMA.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    args = command("--rank", "8", "--json", *flags)
    args.func(args)
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "llama-3.1-8b"


def test_a_dataset_is_counted_by_its_trained_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a", "completion": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    args = command(
        *("--model", "llama-3.1-8b", "--rank", "8", "--json"),
        *("--dataset", str(path), "--tokenizer", "byte"),
    )
    args.func(args)
    # Three and one bytes, and the end of each.
    assert json.loads(capsys.readouterr().out)["capacity"]["data_bits"] == 6


def test_a_dataset_without_a_tokenizer_is_refused() -> None:
    args = command("--model", "llama-3.1-8b", "--rank", "8", "--dataset", "stdlib-text")
    with pytest.raises(ValueError, match="--tokenizer"):
        args.func(args)
