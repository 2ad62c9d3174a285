"""Qwen3-Next and Qwen3.5 without Megatron: joined projections, multimodal directories, servers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.factors import LoRAFactors
from megalora.hf.joined import join_parts, split_joined
from megalora.hf.merge import merge_adapter
from megalora.hf.offline import infer_config
from megalora.hf.peft import read_adapter, write_adapter
from megalora.hf.servers import SERVERS, choose_format, judge_export, served_model
from megalora.model.config_json import load_config, model_shape, read_config
from megalora.model.families import FAMILIES, names_of
from megalora.model.megatron import megatron_args
from megalora.model.served import ServedModel
from megalora.model.shape import ModelShape
from megalora.sync.plan import Plan
from tests.support.hf_models import (
    VOCAB,
    hf_model,
    hf_model_from,
    logits,
    merged,
    random_factors,
)

BAD = pytest.mark.bad_input("a malformed file")
RANKS = {".experts.": (4, 4.0), "": (8, 2.0)}
CONFIG = LoRAConfig(rank=8, alpha=16.0, expert_rank=4)
IN_PROJ = "decoder.layers.0.self_attention.in_proj_lora"
JOINED = {
    "qwen3_next": ("in_proj_qkvz", ("query", "key", "value", "z")),
    "qwen3_5_text": ("in_proj_qkv", ("query", "key", "value")),
}
Factors = dict[str, LoRAFactors]


def shape_of(family: str) -> ModelShape:
    return model_shape(hf_model(family).config.to_dict())


def module(rows: int) -> LoRAFactors:
    return LoRAFactors(torch.ones(2, 32), torch.ones(rows, 2), 1.0)


def same(first: Factors, second: Factors) -> bool:
    return first.keys() == second.keys() and all(
        m.lora_A.equal(second[n].lora_A)
        and m.lora_B.equal(second[n].lora_B)
        and m.scale == second[n].scale
        for n, m in first.items()
    )


# === Several projections in one ===


@pytest.mark.parametrize("family", JOINED)
def test_an_adapter_of_joined_projections_is_one_again(family: str) -> None:
    factors, shape = random_factors(hf_model(family), RANKS), shape_of(family)
    tensors = from_hf(factors, CONFIG, shape, padded_vocab_size=VOCAB)
    # A of each of query, key, value and z, which are one there.
    parts = tensors[f"{IN_PROJ}.lora_A"].chunk(4)
    assert parts[0].equal(parts[1])
    assert same(factors, to_hf(tensors, CONFIG, shape))


@pytest.mark.parametrize("family", JOINED)
def test_projections_with_an_a_each_are_joined_in_blocks_and_split_again(family: str) -> None:
    factors, shape = random_factors(hf_model(family), RANKS), shape_of(family)
    tensors = from_hf(factors, CONFIG, shape, padded_vocab_size=VOCAB)
    tensors[f"{IN_PROJ}.lora_A"] = torch.randn(32, 32) * 0.1
    exported = to_hf(tensors, CONFIG, shape)
    name, parts = JOINED[family]
    joined = exported[f"model.layers.0.linear_attn.{name}"]
    assert (joined.rank, joined.scale) == (8 * len(parts), 2.0)
    own = split_joined(exported, shape)
    for number, part in enumerate(parts):
        module = own[f"model.layers.0.linear_attn.{name}.{part}"]
        a = tensors[f"{IN_PROJ}.lora_A"][8 * number : 8 * number + 8]
        assert module.lora_A.equal(a), part
    assert infer_config(exported, shape) == infer_config(factors, shape)
    again = from_hf(exported, CONFIG, shape, padded_vocab_size=VOCAB)
    assert all(tensors[key].equal(again[key]) for key in tensors)
    assert same(exported, to_hf(again, CONFIG, shape))


@pytest.mark.parametrize("family", JOINED)
def test_rows_of_joined_projections_are_those_of_transformers(family: str) -> None:
    """Each part's update is where transformers' own layer looks for the part."""
    model = hf_model(family)
    layer, shape = model.model.layers[0].linear_attn, shape_of(family)
    name, parts = JOINED[family]
    rows = torch.arange(getattr(layer, name).weight.shape[0]).float()
    one = {f"model.layers.0.linear_attn.{name}": LoRAFactors(torch.ones(1, 32), rows[:, None], 1.0)}
    split = split_joined(one, shape)
    found = [split[f"model.layers.0.linear_attn.{name}.{p}"].lora_B.flatten() for p in parts]
    if family == "qwen3_next":
        ba = torch.zeros(1, 1, 2 * layer.num_v_heads)
        theirs = layer.fix_query_key_value_ordering(rows[None, None], ba)[: len(parts)]
    else:
        theirs = rows.split([layer.key_dim, layer.key_dim, layer.value_dim])
    for own, expected in zip(found, theirs, strict=True):
        assert own.equal(expected.flatten())


def test_the_rank_of_joined_projections_does_not_follow_values_where_that_is_asked() -> None:
    shape = shape_of("qwen3_5_text")
    parts = split_joined(random_factors(hf_model("qwen3_5_text"), RANKS), shape)
    name = "model.layers.0.linear_attn.in_proj_qkv"
    assert join_parts(parts, shape, by_values=True)[name].rank == 8
    # They still are one tensor.
    assert join_parts(parts, shape, by_values=False)[name].rank == 8
    apart = {n: replace(m, lora_A=m.lora_A.clone()) for n, m in parts.items()}
    assert join_parts(apart, shape, by_values=True)[name].rank == 8
    assert join_parts(apart, shape, by_values=False)[name].rank == 24


def test_gates_of_delta_nets_are_inferred_and_refused_where_they_have_no_adapter() -> None:
    shape = shape_of("qwen3_next")
    factors = random_factors(hf_model("qwen3_next"), RANKS, gates=True)
    config = infer_config(factors, shape)
    assert (config.rank, config.delta_gates) == (8, True)
    without = {name: m for name, m in factors.items() if "in_proj_ba" not in name}
    assert not infer_config(without, shape).delta_gates
    assert same(factors, to_hf(from_hf(factors, config, shape), config, shape))
    with pytest.raises(ValueError, match=r"in_proj_ba\.beta.*--lora-delta-gates"):
        from_hf(factors, replace(config, delta_gates=False), shape)


@BAD
def test_joined_projections_of_another_model_are_refused() -> None:
    shape = shape_of("qwen3_5_text")
    name = "model.layers.{}.linear_attn.in_proj_qkv"
    with pytest.raises(ValueError, match=r"in_proj_qkv: lora_B has 60 rows, the model 64"):
        from_hf({name.format(0): module(60)}, CONFIG, shape)
    with pytest.raises(ValueError, match=r"layers\.1\.linear_attn\.in_proj_qkv\.query"):
        from_hf({name.format(1): module(64)}, CONFIG, shape)


# === Configurations ===

# As published, but for the number of layers; fields without a meaning here are left out.
QWEN3_5_27B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 24,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5"},
}
# As published: layers by their interval, the rotary embedding in old fields.
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_language_model_of_a_published_configuration_is_read() -> None:
    args = megatron_args(QWEN3_5_27B)
    assert args["linear_attention_freq"] == [1, 1, 1, 0]
    assert (args["rotary_percent"], args["rotary_base"]) == (0.25, 10_000_000)
    assert args["attention_output_gate"]
    assert args["layernorm_zero_centered_gamma"]
    assert args["linear_num_value_heads"] == 48
    shape, text = model_shape(QWEN3_5_27B), model_shape(QWEN3_5_27B["text_config"])
    assert (shape, shape.model_type, text.model_type) == (text, "qwen3_5", "qwen3_5_text")
    assert ServedModel.of(QWEN3_5_27B).vocab_size == 248320


def test_layers_are_those_of_an_interval_where_nothing_says_what_each_is() -> None:
    shape = model_shape(QWEN3_NEXT)
    assert shape.delta_net_pattern == [1, 1, 1, 0] * 12
    assert (shape.num_moe_experts, shape.moe_shared_expert_intermediate_size) == (512, 512)
    assert not model_shape({**QWEN3_NEXT, "layer_types": ["full_attention"] * 48}).delta_layers


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_a_field_that_is_not_there_has_transformers_number(family: str) -> None:
    own = transformers.AutoConfig.for_model(family).to_dict()
    own |= own["rope_parameters"]
    defaults = FAMILIES[family].defaults
    assert len(defaults) >= 10
    assert dict(defaults) == {name: own[name] for name in defaults}


@BAD
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"]}, r"layer_types is \['linear_attention'\]: must be"),
        ({"layer_types": ["mamba"] * 48}, "layer_types is"),
        ({"linear_num_key_heads": 5}, "linear_num_value_heads 32 is not divisible by"),
        ({"linear_value_head_dim": "128"}, "linear_value_head_dim is '128'"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_delta_nets_that_are_no_such_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_args({**QWEN3_NEXT, **changes})


@BAD
def test_a_language_model_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text_config is \[\]: must be an object"):
        model_shape({**QWEN3_5_27B, "text_config": []})


# === Multimodal directories ===


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with experts in one tensor, as published, images and one token more."""
    directory = tmp_path_factory.mktemp("qwen3_5_moe")
    model = hf_model("qwen3_5_moe", tied=True)
    model.save_pretrained(str(directory))
    tensors = {
        name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"
    }
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(8, 32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_merge_leaves_images_and_what_predicts_one_token_more(
    multimodal: Path, tmp_path: Path
) -> None:
    model = hf_model("qwen3_5_moe", tied=True)
    factors = random_factors(model, RANKS)
    assert merge_adapter(multimodal, factors, tmp_path / "out")
    before, after = (
        load_file(path / "model.safetensors") for path in (multimodal, tmp_path / "out")
    )
    # Tied before, and adapted.
    assert set(after) == {*before, "lm_head.weight"}
    beside = [name for name in before if name.startswith(("model.visual.", "mtp."))]
    assert len(beside) > 5
    assert all(after[name].equal(before[name]) for name in beside)
    config = load_config(tmp_path / "out")
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    found = logits(hf_model_from(tmp_path / "out"))
    expected = logits(merged(model, factors))
    assert (expected - logits(model)).abs().max() > 0.05
    assert (found - expected).abs().max() < 5e-5


def test_an_adapter_of_the_language_model_alone_fits_the_multimodal_one(
    multimodal: Path, tmp_path: Path
) -> None:
    shape = model_shape(read_config(multimodal))
    factors = random_factors(hf_model("qwen3_5_moe", tied=True), RANKS)
    for family in ("qwen3_5_moe", "qwen3_5_moe_text"):
        write_adapter(
            tmp_path / family,
            factors,
            base_model_name="b",
            format="peft-3d",
            names=names_of(family),
            num_experts=shape.num_moe_experts,
            moe_layers=shape.moe_layers,
            delta_layers=shape.delta_layers,
        )
        keys = load_file(tmp_path / family / "adapter_model.safetensors")
        language = family == "qwen3_5_moe"
        assert any("model.language_model.layers" in key for key in keys) == language
        for reader in ("qwen3_5_moe", "qwen3_5_moe_text"):
            own = read_adapter(tmp_path / family, names=names_of(reader), hidden_size=32)
            assert same(own, factors)


def test_what_is_sent_to_a_server_has_the_sizes_that_were_told_it(multimodal: Path) -> None:
    shape = model_shape(read_config(multimodal))
    factors = random_factors(hf_model("qwen3_5_moe", tied=True), RANKS)
    # Of A's that are one by their values, which training will part.
    layers = from_hf(factors, CONFIG, shape, padded_vocab_size=VOCAB)
    whole = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layers.items()}
    plan = Plan(whole, CONFIG, shape, "peft-3d")
    sent = dict(plan.tensors(layers))
    assert {name: size.shape for name, size in plan.sizes.items()} == {
        name: tuple(tensor.shape) for name, tensor in sent.items()
    }
    place = "base_model.model.model.language_model.layers.0.linear_attn.in_proj_qkv"
    a, b = (sent[f"{place}.lora_{end}.weight"].double() for end in "AB")
    own = factors["model.layers.0.linear_attn.in_proj_qkv"]
    assert a.shape[0] == 24
    torch.testing.assert_close(b @ a, own.lora_B.double() @ own.lora_A.double())


# === Who reads them ===


def test_an_export_for_nobody_has_the_format_that_peft_loads(multimodal: Path) -> None:
    served = served_model(str(multimodal), model_shape(read_config(multimodal)))
    assert served.architecture == "Qwen3_5MoeForConditionalGeneration"
    for name in (None, "peft", "vllm"):
        assert choose_format(name, None, served, shares_outer=False) == "peft-3d"
    factors = random_factors(hf_model("qwen3_5_moe", tied=True), RANKS)
    with pytest.raises(ValueError, match="loads none of the experts"):
        judge_export(factors, "peft", served, "peft")
    judge_export(factors, "peft-3d", served, "peft")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in_proj_ba", "has no LoRA for in_proj_ba"),
        ("in_proj_qkv", "has no LoRA for in_proj_qkv"),
        ("in_proj_z", "in_proj_z without in_proj_q, in_proj_k, in_proj_v"),
    ],
)
def test_sglang_is_refused_what_it_drops_without_a_word(name: str, message: str) -> None:
    one = {f"model.layers.0.linear_attn.{name}": module(4)}
    served = ServedModel(architecture="Qwen3_5ForCausalLM")
    with pytest.raises(ValueError, match=message):
        judge_export(one, "uniform", served, "sglang")


def test_the_gates_of_qwen3_next_are_refused_for_sglang() -> None:
    factors = random_factors(hf_model("qwen3_next"), RANKS, gates=True)
    served = ServedModel.of(QWEN3_NEXT)
    with pytest.raises(ValueError, match=r"in_proj_ba.*attention for one without gates"):
        judge_export(factors, "uniform", served, "sglang")
    experts = {name: module for name, module in factors.items() if ".experts." in name}
    judge_export(experts, "uniform", served, "sglang")


def test_every_server_has_a_verdict_on_delta_nets() -> None:
    factors = {
        n: m for n, m in random_factors(hf_model("qwen3_5"), RANKS).items() if n != "lm_head"
    }
    served = ServedModel.of(QWEN3_5_27B)
    for name in set(SERVERS) - {"sglang", "tinker"}:
        assert judge_export(factors, "peft", served, name), name
