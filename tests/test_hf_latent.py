"""Attention through latents in a config.json: sizes, flags, names and parts of tensors."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.cuts import Piece, Placement, Shard
from megalora.hf.factors import LoRAFactors
from megalora.hf.linears import linears
from megalora.hf.merge import merge_adapter
from megalora.hf.run_flags import targets_of
from megalora.hf.weights import Weights
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_args, megatron_flags
from megalora.model.rope import Yarn, rope, rope_without_flags
from tests.support.forked import call
from tests.support.fuzzing import command

# As published.
DEEPSEEK_V31: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = {
    **DEEPSEEK_V31,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "quantization_config": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V31,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**DEEPSEEK_V31["rope_scaling"], "beta_fast": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def weights(config: dict[str, Any], *, tp: tuple[int, int] = (0, 1), predictions: int = 0):
    placement = Placement(Shard(*tp), Shard(), Shard())
    return Weights(config, placement, num_predictions=predictions)


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))


def biases(shapes: dict[str, tuple[int, ...]]) -> int:
    return count({n: s for n, s in shapes.items() if n.endswith("e_score_correction_bias")})


@pytest.mark.parametrize(
    ("config", "numbers", "in_routers"),
    [
        (DEEPSEEK_V31, 671_026_404_352, 58 * 256),
        (MOONLIGHT, 15_960_108_544, 26 * 64),
        (KIMI_K2, 1_026_408_209_408, 60 * 384),
    ],
    ids=["deepseek_v3", "moonlight", "kimi_k2"],
)
def test_a_model_has_the_known_number_of_parameters(
    config: dict[str, Any], numbers: int, in_routers: int
) -> None:
    shapes = weights(config).expected()
    assert (biases(shapes), count(shapes) - biases(shapes)) == (in_routers, numbers)


def test_deepseek_v31_has_as_many_numbers_in_its_files_as_published() -> None:
    model = weights(DEEPSEEK_V31, predictions=1)
    shapes = model.expected()
    blocks = [
        -(-rows // 128) * -(-columns // 128)
        for name, (rows, *rest) in shapes.items()
        if "_proj" in name and "eh_proj" not in name
        for columns in rest
    ]
    copies = {name: shapes[original] for name, original in model.copies().items()}
    assert copies.keys() == {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }
    assert count(shapes) + count(copies) + sum(blocks) == 684_531_386_000


def test_flags_are_those_of_attention_through_latents() -> None:
    text = " ".join(megatron_flags(KIMI_K2)) + " "
    for part in (
        "--multi-latent-attention",
        "--q-lora-rank 1536",
        "--kv-lora-rank 512",
        "--qk-head-dim 128",
        "--qk-pos-emb-head-dim 64",
        "--v-head-dim 128",
        "--qk-layernorm",
        "--rope-type yarn",
        "--rotary-scaling-factor 32.0",
        "--mscale 1.0",
        "--mscale-all-dim 1.0",
        "--rotary-base 50000",
    ):
        assert part + " " in text
    # Megatron ends a run with groups there.
    for part in ("--group-query-attention", "--kv-channels", "--num-query-groups", "--no-rope"):
        assert part not in text


def test_queries_without_a_latent_and_an_embedding_that_is_not_scaled_have_flags() -> None:
    text = " ".join(megatron_flags(MOONLIGHT)) + " "
    assert "--q-lora-rank" not in text
    for part in ("--rope-type rope", "--mscale-all-dim 0.0", "--no-rope-fusion"):
        assert part + " " in text
    assert megatron_args(MOONLIGHT)["q_lora_rank"] is None
    assert model_shape(MOONLIGHT).q_lora_rank == 0


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Yarn(factor=4.0, original_max_position_embeddings=163840)),
        # What transformers takes for nothing and for 0.
        ({"beta_fast": 0, "mscale": None}, Yarn(factor=4, original_max_position_embeddings=163840)),
        ({"mscale": 0.7}, Yarn(factor=4.0, original_max_position_embeddings=163840)),
        (
            {"mscale": 0.7, "mscale_all_dim": 0.5, "original_max_position_embeddings": 8},
            Yarn(factor=4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.5),
        ),
    ],
)
def test_yarn_is_what_transformers_takes(values: dict[str, Any], expected: Yarn) -> None:
    config = {**DEEPSEEK_V31, "rope_scaling": None, "rope_parameters": {**YARN, **values}}
    assert rope(config).yarn == expected


@pytest.mark.bad_input("a number that is not one")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_key_value_heads": 64}, "num_key_value_heads is 64: must be num_attention_heads"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63: must be even"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0: must be an integer >= 1"),
        ({"v_head_dim": "128"}, "v_head_dim is '128'"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor of the yarn rope is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate of the yarn rope is False"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor of the yarn rope"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "mscale of the yarn rope is missing"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0",
        ),
    ],
)
def test_what_megatron_has_not_is_refused_by_field_and_value(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_args({**DEEPSEEK_V31, **change})


def refusal(*words: object) -> str:
    """Return what a command refuses by."""
    try:
        return command(*words)
    except ValueError as error:
        return str(error)


@pytest.mark.bad_input("a number that is not one")
def test_a_checkpoint_whose_runs_would_scale_otherwise_is_not_written(tmp_path: Path) -> None:
    scaling = {**KIMI_K2["rope_scaling"], "original_max_position_embeddings": 8}
    base = directory(tmp_path / "base", {**TINY, "rope_scaling": scaling})
    said = "has beta_fast 1 and original_max_position_embeddings 8 in its yarn rope"
    assert said in call(refusal, "import-base", "--hf-model", base, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert rope_without_flags(DEEPSEEK_V31) == rope_without_flags(MOONLIGHT) == ""


def test_a_merged_base_keeps_the_layer_that_predicts_one_token_more(tmp_path: Path) -> None:
    base, name = directory(tmp_path / "base", TINY), "model.layers.1.self_attn.kv_b_proj"
    module = LoRAFactors(torch.ones(2, 6), torch.ones(16, 2), 0.5)
    merge_adapter(base, {name: module}, tmp_path / "merged")
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{name}.weight"}
    assert any(n.startswith("model.layers.2.") for n in after)


@pytest.mark.parametrize("leaf", ["eh_proj", "self_attn.q_proj"])
def test_adapters_of_a_layer_that_predicts_one_token_more_are_refused_by_name(leaf: str) -> None:
    factors = {f"model.layers.2.{leaf}": LoRAFactors(torch.ones(2, 8), torch.ones(18, 2), 1.0)}
    with pytest.raises(ValueError, match=rf"{leaf}: model.layers.2.\* predicts one token more"):
        from_hf(factors, LoRAConfig(rank=2), model_shape(TINY))


@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_targets_of_attention_through_latents_are_short(q_lora_rank: int | None) -> None:
    shape = model_shape({**TINY, "q_lora_rank": q_lora_rank})
    found = {
        (layer, linear)
        for linear in linears(names_of("deepseek_v3")).values()
        for layer in range(2)
        if linear.megatron.startswith("self_attention.") and linear.fits(layer, shape)
    }
    queries = ["linear_q_down_proj", "linear_q_up_proj"] if q_lora_rank else ["linear_q_proj"]
    expected = ("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", *queries)
    assert targets_of(found, shape) == tuple(sorted(expected))


def test_the_joint_down_projection_is_exchanged_as_two() -> None:
    shape = replace(model_shape({**TINY, "q_lora_rank": 6}), mla_down_proj_fusion=True)
    config = LoRAConfig(rank=2)
    names = [f"model.layers.1.self_attn.{n}" for n in ("q_a_proj", "kv_a_proj_with_mqa")]
    factors = {
        name: LoRAFactors(torch.randn(2, 8), torch.randn(rows, 2), config.scale(2))
        for name, rows in zip(names, (6, 10), strict=True)
    }
    tensors = from_hf(factors, config, shape)
    place = "decoder.layers.1.self_attention.linear_qkv_down_proj_lora"
    assert {n: t.shape for n, t in tensors.items()} == {
        f"{place}.lora_A": (4, 8),
        f"{place}.lora_B": (16, 2),
    }
    assert torch.equal(tensors[f"{place}.lora_B"][:6], factors[names[0]].lora_B)
    back = to_hf(tensors, config, shape)
    assert back.keys() == factors.keys()
    assert all(torch.equal(back[n].lora_A, factors[n].lora_A) for n in names)
    assert all(torch.equal(back[n].lora_B, factors[n].lora_B) for n in names)


PLACE = "decoder.layers.0.self_attention."


@pytest.mark.parametrize(
    ("name", "hf_name", "rows"),
    [
        ("linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm", 1536),
        ("linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm", 512),
        ("linear_qkv_down_proj.layer_norm_weight", "input_layernorm", 7168),
    ],
)
def test_transformer_engine_keeps_norms_in_the_linears_behind_them(
    name: str, hf_name: str, rows: int
) -> None:
    [piece] = weights(DEEPSEEK_V31, tp=(1, 2)).pieces(PLACE + name, 5, rows)
    assert piece == Piece(f"model.layers.5.{hf_name}.weight", 0, rows, 0)


def test_a_down_projection_is_whole_on_every_rank_or_split() -> None:
    rank, name = weights(DEEPSEEK_V31, tp=(1, 2)), "model.layers.5.self_attn.q_a_proj.weight"
    whole = rank.pieces(PLACE + "linear_q_down_proj.weight", 5, 1536)
    assert whole == [Piece(name, 0, 1536, 0)], "TransformerEngine's"
    split = rank.pieces(PLACE + "linear_q_down_proj.weight", 5, 768)
    assert split == [Piece(name, 0, 768, 768)]


def test_a_rank_holds_a_part_of_each_of_the_joint_down_projections() -> None:
    pieces = weights(DEEPSEEK_V31, tp=(1, 2)).pieces(PLACE + "linear_qkv_down_proj.weight", 5, 1056)
    attention = "model.layers.5.self_attn."
    assert pieces == [
        Piece(f"{attention}q_a_proj.weight", 0, 768, 768),
        Piece(f"{attention}kv_a_proj_with_mqa.weight", 768, 288, 288),
    ]


def test_a_norm_of_queries_without_a_latent_has_no_counterpart() -> None:
    with pytest.raises(ValueError, match=r"linear_q_proj.layer_norm_weight has no counterpart"):
        weights(MOONLIGHT).pieces(PLACE + "linear_q_proj.layer_norm_weight", 5, 2048)


TINY: dict[str, Any] = {
    **MOONLIGHT,
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "vocab_size": 16,
}


def directory(place: Path, config: dict[str, Any]) -> Path:
    """Write zeros as TINY's tensors, the layer that predicts one token more among them."""
    place.mkdir(exist_ok=True)
    shapes = weights(TINY, predictions=1).expected()
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, place / "model.safetensors"
    )
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_layer_that_predicts_one_token_more_is_no_layer_of_the_decoder(tmp_path: Path) -> None:
    assert model_shape(read_config(directory(tmp_path, TINY))).num_layers == 2


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers 3 \(its tensors 2\)"),
        ({"kv_lora_rank": 5}, r"kv_lora_rank 5 \(its tensors 6\)"),
        ({"qk_rope_head_dim": 6}, r"kv_lora_rank \+ qk_rope_head_dim 12 \(its tensors 10\)"),
        (
            {"qk_nope_head_dim": 6},
            r"\(qk_nope_head_dim \+ qk_rope_head_dim\) 20 \(its tensors 18\)",
        ),
        ({"v_head_dim": 4}, r"\(qk_nope_head_dim \+ v_head_dim\) 18 \(its tensors 16\)"),
    ],
)
def test_tensors_of_other_latent_sizes_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        read_config(directory(tmp_path, {**TINY, **change}))
