"""gpt-oss's experts, transposed and interleaved in one tensor, against PEFT and transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.inspect import inspect_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.servers import SERVERS, choose_format
from megalora.hf.servers.outline import outline_of_directory
from megalora.hf.stacked_weights import stacked
from megalora.model.config_json import model_shape
from megalora.model.families import names_of
from megalora.model.megatron import megatron_args, megatron_flags
from megalora.model.rope import rope
from megalora.model.served import ServedModel
from tests.support.hf_models import (
    NUM_EXPERTS,
    VOCAB,
    hf_config,
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    random_factors,
    trained_by_peft,
)
from tests.test_hf_family_names import difference, peft_verdict, read, same, shape_of, write

RANKS = {"lm_head": (2, 4.0), ".experts.": (4, 0.5), "": (8, 2.0)}
TOLERANCE = 5e-6
GATE_UP_B = "mlp.experts.base_layer.lora_B.weight"
# The config.json of gpt-oss 20b, but for what nothing is computed by.
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_model("gpt_oss")


@pytest.fixture(scope="module")
def factors(model: Any) -> Any:
    return random_factors(model, RANKS, routers=True)


def test_peft_loads_experts_and_routers(model: Any, factors: Any, tmp_path: Path) -> None:
    directory, expected = write(tmp_path / "a", model, factors, "peft-3d"), merged(model, factors)
    loaded = peft_model(model, directory)
    assert difference(loaded, logits(expected)) < TOLERANCE
    assert same(factors, read(directory, model))
    assert not peft_verdict(directory, model)
    for part in (".experts", "mlp.router", "q_proj", "lm_head"):
        changed = [p for n, p in loaded.named_parameters() if part in n and "lora_B" in n]
        with torch.no_grad():
            for param in changed:
                param.neg_()
        assert difference(loaded, logits(expected)) > 1e-4, part


def test_an_adapter_is_inspected_without_its_base(model: Any, factors: Any, tmp_path: Path) -> None:
    report = inspect_peft(write(tmp_path / "a", model, factors, "peft-3d"))
    assert not report.warnings
    gate, up, down = sorted(row for row in report.table().splitlines() if ".experts." in row)[-3:]
    assert {tuple(row.split()[1:4]) for row in (gate, up, down)} == {("32", "4", "0.5")}


def test_rows_that_do_not_alternate_show(model: Any, factors: Any, tmp_path: Path) -> None:
    directory = write(tmp_path / "a", model, factors, "peft-3d")
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(GATE_UP_B):
            tensors[name] = tensors[name].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    assert difference(peft_model(model, directory), logits(merged(model, factors))) > 1e-3


@pytest.mark.parametrize("format", ["peft", "uniform"])
def test_what_peft_does_not_load_is_said(
    format: Any, model: Any, factors: Any, tmp_path: Path
) -> None:
    directory = write(tmp_path / "a", model, factors, format)
    assert "loads none of the experts" in peft_verdict(directory, model)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        peft_model(model, directory)


def test_an_export_is_what_peft_loads_and_vllm_takes_unless_another_is_asked_for(
    model: Any, factors: Any, tmp_path: Path
) -> None:
    served = ServedModel.of({**model.config.to_dict(), "architectures": [type(model).__name__]})
    for reader in (None, "peft", "vllm"):
        assert choose_format(reader, None, served, shares_outer=False) == "peft-3d"
    assert choose_format(None, "uniform", served, shares_outer=False) == "uniform"
    without = {name: module for name, module in factors.items() if name != "lm_head"}
    for place, some in (("all", factors), ("without", without)):
        outline = outline_of_directory(write(tmp_path / place, model, some, "peft-3d"))
        problems = "; ".join(SERVERS["vllm"].judge(outline, served).problems)
        assert ("lm_head" in problems) == (some is factors), problems
        assert bool(problems) == (some is factors), problems


@pytest.mark.parametrize("part", ["experts of one layer", "routers", "attention"])
def test_peft_loads_adapters_of_some_modules_and_no_others(
    part: str, model: Any, factors: Any, tmp_path: Path
) -> None:
    pattern = {
        "experts of one layer": r".*layers\.1\.mlp\.experts\.(3\.gate_proj|11\.down_proj)",
        "routers": r".*mlp\.router",
        "attention": r".*layers\.1\.self_attn\..*",
    }[part]
    some = {name: module for name, module in factors.items() if re.fullmatch(pattern, name)}
    directory = write(tmp_path / "a", model, some, "peft-3d")
    assert some
    assert read(directory, model).keys() == some.keys()
    assert difference(peft_model(model, directory), logits(merged(model, some))) < TOLERANCE


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_an_adapter_that_peft_trained_is_read(parameter: str, model: Any, tmp_path: Path) -> None:
    targets = [f"experts.{parameter}", "mlp.router.weight"]
    config = LoraConfig(
        r=6,
        lora_alpha=9,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        target_parameters=targets,
    )
    expected = trained_by_peft(model, config, tmp_path / "a")
    assert difference(model, expected) > 1e-3
    factors = read(tmp_path / "a", model)
    assert difference(merged(model, factors), expected) < TOLERANCE
    again = write(tmp_path / "b", model, factors, "peft-3d")
    assert difference(peft_model(model, again), expected) < TOLERANCE


def test_adapters_go_through_megatrons_names_and_back(model: Any) -> None:
    shape = shape_of(model)
    config = LoRAConfig(rank=8, alpha=16.0, expert_rank=4, targets=("all", "router"))
    factors = random_factors(model, {".experts.": (4, 4.0), "": (8, 2.0)}, routers=True)
    tensors = from_hf(factors, config, shape, padded_vocab_size=VOCAB + 6)
    assert same(factors, to_hf(tensors, config, shape))
    assert "decoder.layers.1.mlp.router_lora.lora_A" in tensors


def test_the_merged_directory_has_the_logits_of_the_merged_model(
    model: Any, factors: Any, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model.save_pretrained(str(base))
    merge_adapter(base, factors, tmp_path / "out")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    assert before.keys() == after.keys()
    kept = {name for name in before if before[name].equal(after[name])}
    assert {name for name in kept if "bias" in name or "sinks" in name} == {
        name for name in before if "bias" in name or "sinks" in name
    }
    expected = logits(merged(model, factors))
    assert difference(model, expected) > 0.05
    assert difference(hf_model_from(tmp_path / "out"), expected) < TOLERANCE


def test_tensors_of_single_experts_are_joined_as_the_file_has_them(model: Any) -> None:
    names, one = names_of("gpt_oss"), "model.layers.1.mlp.experts"
    state = model.state_dict()
    gate_up, bias = state[f"{one}.gate_up_proj"], state[f"{one}.gate_up_proj_bias"]
    single = {
        f"{one}.{expert}.{part}.{kind}": value
        for expert in range(NUM_EXPERTS)
        for number, part in enumerate(("gate_proj", "up_proj"))
        for kind, value in (
            ("weight", gate_up[expert, :, number::2].t()),
            ("bias", bias[expert, number::2]),
        )
    }
    joined = stacked({**single, "model.norm.weight": bias}, names)
    assert joined.keys() == {f"{one}.gate_up_proj", f"{one}.gate_up_proj_bias", "model.norm.weight"}
    assert joined[f"{one}.gate_up_proj"].equal(gate_up)
    assert joined[f"{one}.gate_up_proj_bias"].equal(bias)


def test_the_published_configuration_becomes_flags() -> None:
    text = " ".join(megatron_flags(GPT_OSS_20B))
    for part in (
        "--position-embedding-type yarn",
        "--rotary-base 150000",
        "--rotary-scaling-factor 32.0",
        "--yarn-original-max-position-embeddings 4096",
        "--no-yarn-correction-range-round-to-int",
        "--no-rope-fusion",
        "--no-bias-dropout-fusion",
        "--quick-geglu",
        "--glu-linear-offset 1.0",
        "--activation-func-clamp-value 7.0",
        "--softmax-type learnable",
        "--window-size 127,0",
        "--window-attn-skip-freq [1,0,1,0,",
        "--moe-router-topk 4",
        "--moe-ffn-hidden-size 2880",
    ):
        assert part in text, part
    assert "--disable-bias-linear" not in text
    assert "--swiglu" not in text
    hybrid = " ".join(megatron_flags(GPT_OSS_20B, hybrid=True))
    assert "--window-attn-skip-freq [1,1,0,0,1,1," in hybrid
    assert "--hybrid-layer-pattern *E*E" in hybrid


def test_what_a_configuration_does_not_say_is_what_transformers_takes() -> None:
    whole = json.loads(hf_config("gpt_oss", layer_types=None).to_json_string())
    bare = {name: whole[name] for name in whole if name not in ("layer_types", "rope_parameters")}
    args = megatron_args(bare)
    assert args["window_attn_skip_freq"] == [1, 0]
    own = hf_config("gpt_oss", rope_parameters=None, layer_types=None)
    assert own.layer_types == ["sliding_attention", "full_attention"]
    assert rope(bare) == rope({**bare, "rope_parameters": own.rope_parameters})
    assert rope(bare).yarn == rope(GPT_OSS_20B).yarn


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": False}, "attention_bias is False, gpt_oss is supported with True only"),
        ({"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5, gpt_oss is supported with 1.702 only"),
        ({"swiglu_limit": "high"}, "swiglu_limit is 'high': must be a number"),
        ({"swiglu_limit": None}, "swiglu_limit is null"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*for each of 24 layers"),
        ({"layer_types": ["chunked_attention"] * 24}, "full_attention and sliding_attention alone"),
        ({"layer_types": "sliding"}, "layer_types is 'sliding'"),
        ({"sliding_window": None}, "sliding_window is null, and layer_types has sliding_attention"),
        ({"sliding_window": 0}, "sliding_window is 0: must be an integer >= 1"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor of the yarn rope is missing"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        (
            {"rope_scaling": {**GPT_OSS_20B["rope_scaling"], "truncate": "no"}},
            "truncate is 'no': must be true or false",
        ),
        (
            {"rope_scaling": {**GPT_OSS_20B["rope_scaling"], "attention_factor": 2.0}},
            "attention_factor of the yarn rope is 2.0",
        ),
    ],
    ids=str,
)
def test_another_computation_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_args({**GPT_OSS_20B, **changes})


def test_sizes_of_the_published_model() -> None:
    shape = model_shape(GPT_OSS_20B)
    assert (shape.num_moe_experts, shape.moe_router_topk, shape.moe_ffn_hidden_size) == (
        32,
        4,
        2880,
    )
    assert (shape.add_bias_linear, shape.softmax_type, shape.unmapped) == (True, "learnable", "")
