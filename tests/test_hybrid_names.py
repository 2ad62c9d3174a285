"""The HybridModel that equals a GPT model: its pattern, its modules' names, its sizes."""

import argparse
from typing import Any

import pytest

from megalora.model.arguments import args_shape
from megalora.model.config_json import model_shape
from megalora.model.hybrid import as_gpt, equals_gpt, gpt_name, pattern_of
from megalora.model.megatron import megatron_flags
from megalora.model.shape import ModelShape
from megalora.training.flags import with_hf_flags
from tests.support.hf_models import hf_config

LATENT = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "v_head_dim": 8}


def shape(**changes: Any) -> ModelShape:
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    return ModelShape(**{**sizes, "kv_channels": 16, **changes})


def mixed(**changes: Any) -> ModelShape:
    return shape(num_moe_experts=8, moe_layer_freq=[0, 1, 0, 1], **changes)


@pytest.mark.parametrize(
    ("model", "stages", "predictions", "pattern"),
    [
        (shape(), 1, 0, "*-*-*-*-"),
        (shape(), 2, 0, "*-*-|*-*-"),
        (mixed(), 4, 0, "*-|*E|*-|*E"),
        (mixed(multi_latent_attention=True, **LATENT), 2, 2, "+-+E|+-+E/+E/+E"),
    ],
)
def test_a_pattern_has_a_pair_for_each_layer_of_the_gpt_model(
    model: ModelShape, stages: int, predictions: int, pattern: str
) -> None:
    assert pattern_of(model, stages=stages, predictions=predictions) == pattern
    assert equals_gpt(pattern)
    fields = as_gpt({"num_layers": 8, "num_moe_experts": 8}, pattern)
    assert fields["num_layers"] == 4
    assert fields["moe_layer_freq"] == model.moe_pattern
    assert fields["num_moe_experts"] == (8 if model.num_moe_experts else None)
    assert fields["multi_latent_attention"] == model.multi_latent_attention


@pytest.mark.parametrize("stages", [0, -1, 3, 8])
def test_stages_that_do_not_divide_the_layers_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match=f"pipeline_model_parallel_size (is )?{stages}"):
        pattern_of(shape(), stages=stages)


NAMES = {
    "decoder.layers.0.self_attention.linear_qkv": "decoder.layers.0.self_attention.linear_qkv",
    "decoder.layers.7.mlp.experts.linear_fc1": "decoder.layers.3.mlp.experts.linear_fc1",
    "decoder.final_norm.weight": "decoder.final_layernorm.weight",
    "mtp.layers.1.mtp_model_layer.layers.1.mlp.router": "mtp.layers.1.mtp_model_layer.mlp.router",
    "output_layer": "output_layer",
}


@pytest.mark.parametrize("name", NAMES)
def test_modules_of_an_equal_hybrid_have_the_names_of_the_gpt_model(name: str) -> None:
    assert gpt_name(name, "*-*-|*-*E/*E") == NAMES[name]
    for other in ("M-*E", "*-E*", "*-*", "*-*E/*-", "", None):
        assert gpt_name(name, other) == name


def test_a_hybrid_s_flags_give_the_sizes_of_the_gpt_model() -> None:
    dense = argparse.Namespace(hidden_size=64, num_attention_heads=4, vocab_size=96)
    hybrid = argparse.Namespace(**vars(dense), num_layers=8, hybrid_layer_pattern="*-*-|*-*-")
    dense.num_layers = 4
    assert args_shape(hybrid) == args_shape(dense)
    hybrid.hybrid_layer_pattern = "*-*-*-D-"
    with pytest.raises(ValueError, match=r"whose layer 6 is sparse attention \(D\)"):
        args_shape(hybrid)


def test_flags_of_a_base_are_those_of_the_hybrid_where_one_is_meant(tmp_path: Any) -> None:
    config = hf_config("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0])
    config.save_pretrained(tmp_path)
    given = ["--hf-model", str(tmp_path), "--pipeline-model-parallel-size", "2"]
    read = config.to_dict()
    assert with_hf_flags(given) == [*megatron_flags(read), *given]
    flags = with_hf_flags([*given, "--hybrid", "--mtp-num-layers", "1"])
    assert "--num-layers" not in flags
    assert "--moe-layer-freq" not in flags
    assert flags[flags.index("--hybrid-layer-pattern") + 1] == "*-*E|*E*E/*E"
    own = with_hf_flags([*given, "--hybrid-layer-pattern", "*-|*E*E*E"])
    assert own[-1] == "*-|*E*E*E"
    assert own.index("--hybrid-layer-pattern") < len(own) - 2
    assert pattern_of(model_shape(read)) == "*-*E*E*E"
