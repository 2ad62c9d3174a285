"""What a config.json means: sizes, flags, names and parts of tensors, without Megatron."""

import json
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import transformers

from megalora.hf.cuts import Piece, Placement, Shard
from megalora.hf.weights import EXPERT_BIAS, Weights
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import FAMILIES
from megalora.model.megatron import megatron_args, megatron_flags
from megalora.model.rope import rope

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_32_1B = {
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def weights(config, tp=(0, 1), expert_tp=(0, 1), ep=(0, 1)) -> Weights:
    return Weights(config, Placement(Shard(*tp), Shard(*expert_tp), Shard(*ep)))


def test_qwen3_30b_a3b_has_the_shapes_of_its_checkpoint():
    shapes = weights(QWEN3_30B_A3B).expected()
    prefix = "model.layers.47."
    table = {
        "model.embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        prefix + "input_layernorm.weight": (2048,),
        prefix + "post_attention_layernorm.weight": (2048,),
        prefix + "self_attn.q_proj.weight": (4096, 2048),
        prefix + "self_attn.k_proj.weight": (512, 2048),
        prefix + "self_attn.v_proj.weight": (512, 2048),
        prefix + "self_attn.o_proj.weight": (2048, 4096),
        prefix + "self_attn.q_norm.weight": (128,),
        prefix + "self_attn.k_norm.weight": (128,),
        prefix + "mlp.gate.weight": (128, 2048),
        prefix + "mlp.experts.127.gate_proj.weight": (768, 2048),
        prefix + "mlp.experts.127.up_proj.weight": (768, 2048),
        prefix + "mlp.experts.127.down_proj.weight": (2048, 768),
    }
    assert {name: shapes[name] for name in table} == table
    assert len(shapes) == 3 + 48 * (9 + 3 * 128)
    count = sum(rows * (rest[0] if rest else 1) for rows, *rest in shapes.values())
    assert count == 30_532_122_624, "the published number of parameters"


def test_a_tied_model_with_rope_scaling_has_the_published_size():
    shapes = weights(LLAMA_32_1B).expected()
    assert "lm_head.weight" not in shapes
    count = sum(rows * (rest[0] if rest else 1) for rows, *rest in shapes.values())
    assert count == 1_235_814_400


MIXTRAL_8X7B = {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096}
GLM_45_AIR = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "vocab_size": 151552,
}
QWEN15_MOE = {"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048}


def model_type(config: dict[str, object]) -> str:
    return str(config["model_type"])


# transformers' own defaults.
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "n_routed_experts": 256}
GLM_47_FLASH = {"model_type": "glm4_moe_lite"}
PHI_4 = {"model_type": "phi3", "num_key_value_heads": 8}
# Nemotron-H-8B, of 8,100,852,736 parameters.
NEMOTRON_H = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}
# Of latent experts, as Nemotron 3 Super has them.
NEMOTRON_LATENT = {**NEMOTRON_H, "hybrid_override_pattern": "ME*-E", "moe_latent_size": 1024}
# Its numbers are those of gpt-oss 120b; of 20b two are others.
GPT_OSS = {"model_type": "gpt_oss"}
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}
QWEN3_NEXT = {"model_type": "qwen3_next"}
QWEN3_5 = {"model_type": "qwen3_5_text"}
QWEN3_5_MOE = {"model_type": "qwen3_5_moe_text"}
GIVEN = [MIXTRAL_8X7B, QWEN15_MOE, GLM_45_AIR, GLM_47_FLASH, DEEPSEEK_V3, GPT_OSS, GPT_OSS_20B]
GIVEN += [QWEN3_NEXT, QWEN3_5, QWEN3_5_MOE]
GIVEN += [PHI_4, NEMOTRON_H, NEMOTRON_LATENT]


@pytest.mark.parametrize("given", GIVEN, ids=model_type)
def test_a_family_has_the_tensors_of_transformers_own_model(given: dict[str, Any]) -> None:
    own = transformers.AutoConfig.for_model(**given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(own)
    # As transformers writes it, with all of its defaults.
    shapes = weights(own.to_dict()).expected()
    # An expert's bias is a buffer there.
    own = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith(EXPERT_BIAS))]
    assert sum(prod(shape) for shape in shapes.values()) == sum(each.numel() for each in own)


def test_arguments_of_a_mixture_of_experts():
    args = megatron_args(QWEN3_30B_A3B)
    assert args["num_experts"] == 128
    assert args["moe_router_topk"] == 8
    assert args["moe_layer_freq"] == [1] * 48
    assert args["moe_router_pre_softmax"] is False
    assert args["untie_embeddings_and_output_weights"] is True
    assert (args["qk_layernorm"], args["add_qkv_bias"]) == (True, False)
    assert args["rotary_base"] == 1_000_000
    assert (args["hidden_dropout"], args["attention_dropout"]) == (0, 0)
    assert megatron_args({**QWEN3_30B_A3B, "attention_dropout": 0.1})["attention_dropout"] == 0.1
    assert args["use_rope_scaling"] is False


def test_flags_carry_switches_values_and_lists():
    text = " ".join(
        megatron_flags({**QWEN3_30B_A3B, "mlp_only_layers": [1], "num_hidden_layers": 3})
    )
    for part in (
        "--num-layers 3",
        "--moe-layer-freq [1,0,1]",
        "--disable-bias-linear",
        "--norm-epsilon 1e-06",
        "--swiglu",
        "--qk-layernorm",
        "--group-query-attention",
    ):
        assert part in text
    assert "--use-rope-scaling" not in text
    scaled = " ".join(megatron_flags(LLAMA_32_1B))
    assert "--use-rope-scaling" in scaled
    assert "--rope-scaling-factor 32.0" in scaled
    assert "--untie" not in scaled


def test_both_spellings_of_the_rotary_embedding_are_read():
    new = {
        **LLAMA_32_1B,
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA_32_1B["rope_scaling"]},
    }
    del new["rope_scaling"], new["rope_theta"]
    assert rope(new) == rope(LLAMA_32_1B)
    assert (rope(new).theta, rope(new).factor) == (500000.0, 32.0)


def test_both_spellings_of_the_number_of_experts_are_read():
    new = {**QWEN3_30B_A3B, "num_local_experts": 128}
    del new["num_experts"]
    assert model_shape(new) == model_shape(QWEN3_30B_A3B)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "'gpt2': supported are .*, kimi_k2, llama, mistral, .*mixtral, nemotron_h, phi3, qwen2",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_experts": None}, "num_experts is None"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor of the llama3 rope is 2.0",
        ),
    ],
)
def test_a_configuration_that_would_compute_something_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        megatron_args({**QWEN3_30B_A3B, **change})


def test_a_directory_of_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="'t5'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("local", "transformer_engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
        ("mlp.experts.local_experts.3.linear_fc2.weight", "mlp.experts.linear_fc2.weight3"),
    ],
)
def test_both_backends_names_mean_the_same_tensor(local, transformer_engine):
    config = weights(QWEN3_30B_A3B, expert_tp=(1, 2), ep=(1, 4))
    first, second = (
        config.pieces(f"decoder.layers.0.{name}", 5, 1) for name in (local, transformer_engine)
    )
    assert first == second
    assert first[0].name.startswith("model.layers.5.")


def test_transformer_engine_keeps_the_norm_of_a_dense_mlp_in_its_linear():
    name = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    [piece] = weights(LLAMA_32_1B).pieces(name, 2, 2048)
    assert piece == Piece("model.layers.2.post_attention_layernorm.weight", 0, 2048, 0)


def test_an_expert_rank_reads_its_experts_and_its_part_of_them():
    config = weights(QWEN3_30B_A3B, expert_tp=(1, 2), ep=(3, 4))
    gate, up = config.pieces("decoder.layers.0.mlp.experts.linear_fc1.weight2", 0, 768)
    assert gate == Piece("model.layers.0.mlp.experts.98.gate_proj.weight", 0, 384, 384)
    assert up == Piece("model.layers.0.mlp.experts.98.up_proj.weight", 384, 384, 384)
    [down] = config.pieces("decoder.layers.0.mlp.experts.linear_fc2.weight2", 0, 2048)
    assert down == Piece("model.layers.0.mlp.experts.98.down_proj.weight", 0, 2048, 0, (384, 768))


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_all_ranks_together_read_every_row_of_q_k_and_v_once(tp):
    read: dict[str, list[int]] = {}
    for rank in range(tp):
        config = weights(LLAMA_32_1B, tp=(rank, tp))
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        pieces = config.pieces(name, 0, 3072 // tp)
        assert sum(piece.count for piece in pieces) == 3072 // tp
        for piece in pieces:
            rows = range(piece.hf_first, piece.hf_first + piece.count)
            read.setdefault(piece.name, []).extend(rows)
    assert {name[-13:-7]: sorted(rows) for name, rows in read.items()} == {
        "q_proj": list(range(2048)),
        "k_proj": list(range(512)),
        "v_proj": list(range(512)),
    }


def test_padding_of_the_vocabulary_has_no_piece():
    config = weights(LLAMA_32_1B, tp=(3, 4))
    name = "embedding.word_embeddings.weight"
    assert config.pieces(name, None, 32100) == [
        Piece("model.embed_tokens.weight", 0, 128256 - 3 * 32100, 3 * 32100)
    ]
    assert weights(LLAMA_32_1B, tp=(7, 8)).pieces(name, None, 20000) == []
    with pytest.raises(ValueError, match="--vocab-size 128256"):
        config.pieces(name, None, 1000)


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="q_layernorm_bias has no counterpart"):
        weights(LLAMA_32_1B).pieces("decoder.layers.0.self_attention.q_layernorm_bias", 0, 64)


def test_every_mapped_family_is_named_by_its_architecture():
    assert {FAMILIES[name].architecture for name in FAMILIES} == {
        "DeepseekV3ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GptOssForCausalLM",
        "LlamaForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronHForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
    }


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
    ],
    ids=str,
)
def test_layers_with_experts_are_read_from_either_side(
    changes: dict[str, object], layers: list[int]
) -> None:
    shape = model_shape({**QWEN3_30B_A3B, "num_hidden_layers": 4, **changes})
    assert shape.moe_layers == layers
    assert replace(shape, moe_layer_freq=2).moe_layers == [0, 2]
    assert replace(shape, num_moe_experts=0).moe_layers == []
