"""Sizes of models, from every source that tells them."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalora.model.arguments import args_shape
from megalora.model.config_json import load_config, model_shape
from megalora.model.presets import named_shape, preset_shape
from megalora.recommend.linears import base_parameters
from tests.support.sizes import (
    LLAMA,
    MEGATRON_LLAMA,
    TINY_LLAMA,
    TINY_MOE,
    TINY_QWEN2_MOE,
)

# 5 heads in a width of 64: where all passes through latents, no size follows from the two.
MEGATRON_LATENT = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 5,
    "vocab_size": 100,
    "multi_latent_attention": True,
    "q_lora_rank": 24,
}


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
    assert base_parameters(preset_shape(preset)) == published


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("deepseek-v3", 671_026_419_200),
        ("kimi-k2", 1_026_408_232_448),
        ("glm-4.5", 352_797_829_024),
        ("glm-4.5-air", 106_852_251_264),
    ],
)
def test_routers_biases_are_all_that_the_published_counts_have_more(
    preset: str, published: int
) -> None:
    shape = preset_shape(preset)
    # A buffer in Megatron, and no parameter.
    biases = len(shape.moe_layers) * shape.num_moe_experts
    assert base_parameters(shape) + biases == published


def test_a_layer_that_predicts_one_token_more_is_counted_as_published() -> None:
    shape = dataclasses.replace(preset_shape("glm-4.5"), mtp_num_layers=1)
    # The files repeat the embedding and the unembedding there.
    biases, copies = 90 * 160, 2 * 151_552 * 5120
    assert base_parameters(shape) + biases + copies == 358_337_791_296


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
        {**TINY_LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
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
    assert base_parameters(model_shape(config)) == expected


def test_a_folder_is_read_like_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_MOE))
    from_folder = named_shape(str(tmp_path))
    from_content = model_shape(TINY_MOE, name=tmp_path.name)
    assert from_folder == from_content


def test_megatron_flags_give_the_shape_and_family_of_the_preset_that_they_spell() -> None:
    assert args_shape(argparse.Namespace(**MEGATRON_LLAMA)) == LLAMA


def test_megatron_flags_of_latent_attention_find_their_preset() -> None:
    sizes = dataclasses.asdict(preset_shape("deepseek-v3"))
    given = {**sizes, "num_experts": 256, "swiglu": True, "vocab_size": 129_536}
    shape = args_shape(argparse.Namespace(**given, untie_embeddings_and_output_weights=True))
    assert shape == dataclasses.replace(preset_shape("deepseek-v3"), vocab_size=129_536)
    assert args_shape(argparse.Namespace(**{**given, "q_lora_rank": 1024})).family == ""


def test_megatron_flags_of_no_preset_have_no_family() -> None:
    other = {**MEGATRON_LLAMA, "num_layers": 31}
    assert args_shape(argparse.Namespace(**other)).family == ""


@pytest.mark.parametrize(("freq", "dense"), [(2, [1, 3]), ([0, 1, 1, 1], [0]), (1, [])])
def test_moe_layer_freq_decides_which_layers_are_dense(freq: Any, dense: list[int]) -> None:
    args = {**MEGATRON_LLAMA, "num_layers": 4, "num_experts": 8, "moe_router_topk": 2}
    shape = args_shape(argparse.Namespace(**args, moe_layer_freq=freq))
    assert shape.dense_layers == dense


def test_megatron_defaults_fill_in_what_flags_leave_out() -> None:
    args = argparse.Namespace(num_layers=1, hidden_size=64, num_attention_heads=4, vocab_size=100)
    shape = args_shape(args)
    assert (shape.ffn_hidden_size, shape.kv_channels, shape.num_query_groups) == (256, 16, 4)
    assert shape.tied_embeddings
    assert not shape.gated_linear_unit


def test_latent_attention_is_read_from_megatrons_flags() -> None:
    shape = args_shape(argparse.Namespace(**MEGATRON_LATENT))
    sizes = (shape.kv_lora_rank, shape.qk_head_dim, shape.qk_pos_emb_head_dim, shape.v_head_dim)
    assert (shape.q_lora_rank, *sizes) == (24, 32, 128, 64, 128)
    direct = args_shape(argparse.Namespace(**{**MEGATRON_LATENT, "q_lora_rank": None}))
    assert direct.q_lora_rank == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset_shape("llama-9"), r"'llama-9' is neither .* llama-3.1-8b"),
        (lambda: model_shape({"model_type": "t5"}), "the sizes as Megatron's flags"),
        (lambda: model_shape({"model_type": "llama"}), "num_attention_heads is None"),
        (lambda: load_config("/nonexistent"), "/nonexistent is no directory here: give one"),
        (
            lambda: args_shape(argparse.Namespace(hybrid_layer_pattern="D*-")),
            r"hybrid_layer_pattern is 'D\*-', whose layer 0 is sparse attention",
        ),
        (
            lambda: args_shape(argparse.Namespace(**MEGATRON_LLAMA, mtp_num_layers=-1)),
            "mtp_num_layers is -1",
        ),
        (
            lambda: args_shape(argparse.Namespace(**{**MEGATRON_LATENT, "v_head_dim": -1})),
            "v_head_dim is -1",
        ),
        (
            lambda: args_shape(argparse.Namespace(**{**MEGATRON_LATENT, "q_lora_rank": -1})),
            "q_lora_rank is -1",
        ),
        (lambda: args_shape(argparse.Namespace(num_layers=2)), "--hidden-size"),
    ],
)
def test_a_model_that_cannot_be_described_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_and_recommendations_need_neither_torch_nor_megatron() -> None:
    line = "import sys, megalora.recommend; print(sys.modules.keys() & {'torch', 'megatron'})"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


DELTA_NETS = {
    **MEGATRON_LLAMA,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "linear_num_value_heads": 48,
}


def test_delta_nets_have_megatrons_sizes_where_none_are_given() -> None:
    shape = args_shape(argparse.Namespace(**DELTA_NETS))
    assert shape.delta_net_pattern == [1, 1, 1, 0] * 8
    assert (shape.delta_key_size, shape.delta_value_size) == (16 * 128, 48 * 128)
    listed = {**DELTA_NETS, "linear_attention_freq": [1, 1, 1, 0] * 8}
    assert base_parameters(args_shape(argparse.Namespace(**listed))) == base_parameters(shape)
    # Megatron's defaults have sizes for delta nets in every model.
    assert dataclasses.replace(LLAMA, linear_key_head_dim=128, linear_num_key_heads=16) == LLAMA


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linear_attention_freq": None}, "linear_attention_freq is missing"),
        ({"linear_attention_freq": [1, 0]}, "linear_attention_freq has 2 entries for 32 layers"),
        ({"linear_num_key_heads": 5}, "linear_num_value_heads 48 is not divisible by .* 5"),
        ({"linear_key_head_dim": -1}, "linear_key_head_dim is -1: must be an integer >= 1"),
        ({"linear_key_head_dim": 10**9}, "linear_key_head_dim is 1000000000: must be 65,536"),
        ({"experimental_attention_variant": "dsa"}, "'dsa', whose linears are not described"),
    ],
)
def test_sizes_of_delta_nets_that_are_none_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        args_shape(argparse.Namespace(**{**DELTA_NETS, **changed}))
