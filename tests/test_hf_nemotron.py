"""Nemotron-H's files: its config.json, its names, and its adapters in PEFT, merged and stored."""

import argparse
import json
import shlex
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf
from megalora.hf.cuts import Placement, Shard
from megalora.hf.factors import LoRAFactors
from megalora.hf.inspect import inspect_peft
from megalora.hf.merge import merge_adapter
from megalora.hf.peft import read_adapter, write_adapter
from megalora.hf.servers import SERVERS
from megalora.hf.servers.outline import outline_of_directory
from megalora.hf.weights import Weights
from megalora.model.arguments import args_shape
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from megalora.model.megatron import megatron_args, megatron_flags
from megalora.model.served import ServedModel
from megalora.model.shape import ModelShape
from megalora.recommend.costs import adapter_parameters
from megalora.recommend.linears import base_parameters
from megalora.training.flags import with_hf_flags
from tests.support import hf_commands
from tests.support.forked import SCRIPT, call
from tests.support.hf_models import (
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    random_factors,
    trained_by_peft,
)
from tests.support.tiny import LORA, flags, train
from tests.test_hybrid_way import LOCAL

# As published; the rest of config.json is transformers' default.
NANO_3 = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 131072,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}
RANKS = {".experts.": (4, 4.0), "": (8, 2.0)}
NAMES = names_of("nemotron_h")


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_model("nemotron_h")


@pytest.fixture(scope="module")
def factors(model: Any) -> dict[str, LoRAFactors]:
    return random_factors(model, RANKS, routers=True)


def without_out_proj(factors: dict[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    return {name: module for name, module in factors.items() if not name.endswith("out_proj")}


def shape_of(model: Any) -> ModelShape:
    return model_shape(model.config.to_dict())


def write(directory: Path, model: Any, factors: dict[str, LoRAFactors], format: Any) -> Path:
    shape = shape_of(model)
    write_adapter(
        directory,
        factors,
        base_model_name="tiny",
        format=format,
        names=NAMES,
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts,
        moe_layers=shape.moe_layers,
    )
    return directory


def judged(reader: str, directory: Path) -> str:
    served = ServedModel.of({**NANO_3, "n_routed_experts": 16})
    return "; ".join(SERVERS[reader].judge(outline_of_directory(directory), served).problems)


def difference(first: Any, second: torch.Tensor) -> float:
    return (logits(first) - second).abs().max().item()


# === config.json ===


def test_the_published_model_has_the_published_parameters() -> None:
    shapes = Weights(NANO_3, Placement(Shard(), Shard(), Shard())).expected()
    assert len(shapes) == 6243
    assert sum(map(prod, shapes.values())) == 31_577_940_288
    # Recommendations leave the bias of the choice of experts out, 128 numbers in 23 layers.
    assert base_parameters(model_shape(NANO_3)) == 31_577_940_288 - 23 * 128


def test_words_and_letters_of_the_layers_are_read_alike() -> None:
    shape = model_shape(NANO_3)
    words = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    spelled = {**NANO_3, "layers_block_type": [words[kind] for kind in shape.hybrid_layer_pattern]}
    # As transformers, which takes the words where both are there, and counts them.
    spelled |= {"hybrid_override_pattern": "M", "num_hidden_layers": 3}
    assert model_shape(spelled) == shape
    assert (shape.num_layers, len(shape.moe_layers)) == (52, 23)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is None: must have a letter"),
        ({"hybrid_override_pattern": "MG"}, "hybrid_override_pattern is 'MG'"),
        ({"hybrid_override_pattern": "*E" * 26}, "without a layer of Mamba-2"),
        ({"hybrid_override_pattern": "M" * 5000}, "4,096 at most"),
        ({"layers_block_type": ["mamba", 3]}, r"layers_block_type is \['mamba', 3\]"),
        ({"layers_block_type": ["mamba", "conv"]}, r"layers_block_type is \['mamba', 'conv'\]"),
        ({"mamba_num_heads": 12}, "mamba_num_heads 12 is not divisible by mamba_num_groups 8"),
        ({"ssm_state_size": 0}, "ssm_state_size is 0"),
        ({"conv_kernel": 3}, "conv_kernel is 3"),
        ({"use_bias": True}, "use_bias is True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"n_group": 4, "topk_group": 2}, "topk_group is 2 of 4"),
        ({"moe_latent_size": -1}, "moe_latent_size is -1"),
    ],
)
@pytest.mark.bad_input("a malformed file")
def test_what_would_compute_something_else_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_args({**NANO_3, **changes})


def test_a_model_without_experts_needs_none_of_their_fields() -> None:
    dense = {**NANO_3, "hybrid_override_pattern": "M-M*-", "num_experts_per_tok": 1}
    dense |= {"n_routed_experts": 0, "moe_intermediate_size": 0}
    assert model_shape(dense).num_moe_experts == 0
    assert not [name for name in megatron_args(dense) if "moe" in name or "expert" in name]


def test_flags_have_the_layers_with_a_cut_for_each_stage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NANO_3))
    text = shlex.join(with_hf_flags(["--hf-model", str(tmp_path)]))
    assert f"--hybrid-layer-pattern '{NANO_3['hybrid_override_pattern']}'" in text
    for flag in ("--squared-relu", "--position-embedding-type none", "--mamba-num-groups 8"):
        assert flag in text
    for flag in ("--swiglu", "--rotary-base", "--num-layers", "--moe-layer-freq"):
        assert flag not in text
    words = megatron_flags(NANO_3, stages=4)
    cut = words[words.index("--hybrid-layer-pattern") + 1]
    assert [len(stage) for stage in cut.split("|")] == [13] * 4
    with pytest.raises(ValueError, match="mtp_num_layers is 1: of nemotron_h the layers that"):
        megatron_flags(NANO_3, predictions=1)


def test_megatrons_flags_tell_the_same_sizes() -> None:
    args = argparse.Namespace(**megatron_args({**NANO_3, "moe_latent_size": 1024}))
    wanted = model_shape({**NANO_3, "moe_latent_size": 1024})
    assert replace(args_shape(args, family="nemotron"), model_type="") == wanted
    args.mamba_num_heads, args.mamba_num_groups = None, 4
    assert args_shape(args).mamba_num_heads == 2 * 2688 // 64


def test_latent_experts_have_their_sizes() -> None:
    latent = {**NANO_3, "moe_latent_size": 1024}
    shapes = Weights(latent, Placement(Shard(), Shard(), Shard())).expected()
    place = "model.layers.1.mixer."
    assert shapes[f"{place}experts.7.up_proj.weight"] == (1856, 1024)
    assert shapes[f"{place}experts.7.down_proj.weight"] == (1024, 1856)
    assert shapes[f"{place}fc1_latent_proj.weight"] == (1024, 2688)
    assert shapes[f"{place}fc2_latent_proj.weight"] == (2688, 1024)
    assert shapes[f"{place}shared_experts.up_proj.weight"] == (3712, 2688)
    assert megatron_args(latent)["moe_latent_size"] == 1024
    assert base_parameters(model_shape(latent)) == sum(map(prod, shapes.values())) - 23 * 128


def test_a_rank_holds_a_part_of_each_part_of_in_proj_and_of_the_convolution() -> None:
    config = Weights(NANO_3, Placement(Shard(1, 4), Shard(), Shard()))
    name = "model.layers.0.mixer."
    for local, sizes in (
        ("in_proj.weight", (4096, 4096, 1024, 1024, 64)),
        ("conv1d_weight", (4096, 1024, 1024)),
    ):
        pieces = config.pieces(f"decoder.layers.0.mixer.{local}", 0, sum(sizes) // 4)
        starts = [sum(sizes[:part]) + size // 4 for part, size in enumerate(sizes)]
        assert [(p.hf_first, p.count) for p in pieces] == [
            (start, size // 4) for start, size in zip(starts, sizes, strict=True)
        ]
    [piece] = config.pieces("decoder.layers.0.mixer.A_log", 0, 16)
    assert (piece.name, piece.hf_first, piece.count) == (f"{name}A_log", 16, 16)
    [piece] = config.pieces("decoder.layers.0.mixer.in_proj.layer_norm_weight", 0, 2688)
    assert (piece.name, piece.count) == ("model.layers.0.norm.weight", 2688)


def test_adapters_of_each_kind_of_layer_are_counted() -> None:
    counts = adapter_parameters(model_shape(NANO_3), LoRAConfig(rank=6, expert_rank=1))
    inner, state = 4096, 1024
    rows = 2 * inner + 2 * state + 64
    assert counts["mamba"] == 6 * 23 * (2688 + rows + inner + 2688)
    assert counts["attention"] == 6 * 6 * (3 * 2688 + 4096 + 2 * 256 + 4096 + 2688)
    assert counts["experts"] == 23 * 128 * 2 * (2688 + 1856)
    assert counts["mlp"] == 6 * 23 * 2 * (2688 + 3712)


# === Adapters ===


@pytest.mark.parametrize("format", ["peft", "uniform", "peft-3d", "tinker"])
def test_each_format_is_read_again(
    format: str, model: Any, factors: dict[str, LoRAFactors], tmp_path: Path
) -> None:
    some = {n: m for n, m in factors.items() if format != "tinker" or ".experts." not in n}
    directory = write(tmp_path / "a", model, some, format)
    found = read_adapter(directory, names=NAMES, hidden_size=32)
    assert found.keys() == some.keys()
    for name, module in some.items():
        torch.testing.assert_close(found[name].delta(), module.delta())


def test_peft_takes_all_but_out_proj_with_experts_in_one_tensor(
    model: Any, factors: dict[str, LoRAFactors], tmp_path: Path
) -> None:
    taken = without_out_proj(factors)
    expected = logits(merged(model, taken))
    assert difference(model, expected) > 0.1
    directory = write(tmp_path / "3d", model, taken, "peft-3d")
    assert difference(peft_model(model, directory), expected) < 5e-6
    assert not judged("peft", directory)
    single = write(tmp_path / "2d", model, taken, "peft")
    assert "loads none of the experts of NemotronHForCausalLM" in judged("peft", single)
    with pytest.raises(AssertionError, match=r"experts.*lora_A"):
        peft_model(model, single)
    whole = write(tmp_path / "whole", model, factors, "peft-3d")
    assert "refuses adapters of NemotronHForCausalLM's out_proj" in judged("peft", whole)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        peft_model(model, whole)


def test_vllm_takes_single_experts_of_two_projections(
    model: Any, factors: dict[str, LoRAFactors], tmp_path: Path
) -> None:
    served = {n: m for n, m in factors.items() if not n.endswith("mixer.gate")}
    assert not judged("vllm", write(tmp_path / "a", model, served, "peft"))
    uniform = write(tmp_path / "uniform", model, served, "uniform")
    assert "none of gate_proj: merge the adapter into its base" in judged("sglang", uniform)
    lacking = {n: m for n, m in served.items() if not n.endswith("experts.3.up_proj")}
    half = {n: m for n, m in lacking.items() if not (".experts." in n and "down" in n)}
    assert not judged("vllm", write(tmp_path / "filled", model, half, "peft"))


def test_an_adapter_that_peft_trained_is_read_and_merged_in_the_files_own_names(
    model: Any, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=6,
        lora_alpha=9,
        task_type="CAUSAL_LM",
        target_modules=["in_proj", "q_proj", "o_proj", "up_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj", "gate.weight"],
    )
    expected = trained_by_peft(model, config, tmp_path / "a")
    assert difference(model, expected) > 1e-3
    factors = read_adapter(tmp_path / "a", names=NAMES, hidden_size=32)
    for name in ("0.mixer.in_proj", "1.mixer.experts.3.down_proj", "1.mixer.gate"):
        assert f"model.layers.{name}" in factors
    assert difference(merged(model, factors), expected) < 5e-6
    model.save_pretrained(str(tmp_path / "base"))
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    merge_adapter(tmp_path / "base", factors, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    assert difference(hf_model_from(tmp_path / "out"), expected) < 5e-6


def test_names_of_the_published_class_are_read_as_those_of_transformers(
    model: Any, factors: dict[str, LoRAFactors], tmp_path: Path
) -> None:
    """The code that NVIDIA publishes beside the weights calls the decoder `backbone`."""
    directory = write(tmp_path / "a", model, factors, "peft")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        path = directory / file
        if file.endswith("json"):
            path.write_text(path.read_text().replace("model.layers", "backbone.layers"))
            continue
        tensors = load_file(path)
        renamed = {k.replace(".model.model.", ".model.backbone."): t for k, t in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, path, metadata={"format": "pt"})
    found = read_adapter(directory, names=NAMES, hidden_size=32)
    assert found.keys() == factors.keys()
    assert found["model.layers.0.mixer.in_proj"].scale == 2.0
    assert "as the base's files do" not in judged("vllm", directory)


def test_inspect_lists_each_kind_of_layer(
    model: Any, factors: dict[str, LoRAFactors], tmp_path: Path
) -> None:
    table = inspect_peft(write(tmp_path / "a", model, factors, "peft")).table()
    for name in ("in_proj", "o_proj", "shared_experts.up_proj", "experts.*.down_proj"):
        assert f"model.layers.*.mixer.{name} " in table


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    "name",
    ["0.mixer.q_proj", "2.mixer.in_proj", "3.mixer.experts.0.up_proj", "1.mixer.up_proj"],
)
def test_a_module_of_another_kind_of_layer_is_refused_by_name(name: str, model: Any) -> None:
    one = {f"model.layers.{name}": LoRAFactors(torch.ones(2, 32), torch.ones(174, 2), 1.0)}
    with pytest.raises(ValueError, match=rf"model\.layers\.{name}.*belongs to another model"):
        from_hf(one, LoRAConfig(rank=2), shape_of(model))


# === Checkpoints ===


def test_an_imported_adapter_is_exported_as_it_was_and_the_base_is_imported(
    model: Any, tmp_path: Path
) -> None:
    factors = random_factors(model, RANKS)
    model.save_pretrained(str(tmp_path / "base"))
    assert read_config(tmp_path / "base")["layers_block_type"][0] == "linear_attention"
    write(tmp_path / "peft", model, factors, "peft")
    base = ["--hf-model", str(tmp_path / "base")]
    for words in (
        ["import", str(tmp_path / "peft"), *base, "--output", str(tmp_path / "ckpt")],
        ["export", str(tmp_path / "ckpt"), "--output", str(tmp_path / "out")],
        ["inspect", str(tmp_path / "ckpt")],
        ["import-base", *base, "--output", str(tmp_path / "megatron"), "--dtype", "float32"],
        ["compare-base", str(tmp_path / "base"), str(tmp_path / "megatron")],
    ):
        status, said, errors = call(hf_commands.run, words)
        assert status == 0, (words[0], errors)
    assert "compared" in said
    found = read_adapter(tmp_path / "out", names=NAMES, hidden_size=32)
    assert found.keys() == factors.keys()
    for name, module in factors.items():
        assert torch.equal(found[name].lora_A, module.lora_A)
        torch.testing.assert_close(found[name].delta(), module.delta())


# === A run ===


def test_a_run_from_its_files_exports_what_its_checkpoint_holds(tmp_path: Path) -> None:
    """Of two pipeline stages, whose cut follows from config.json; another layout loads the same."""
    base = tmp_path / "base"
    hf_model("nemotron_h", vocab_size=255).save_pretrained(str(base))
    given = ["--hf-model", base, *LORA, "--lora-targets", "tinker", "--export-for", "vllm"]
    options = {"model": LOCAL, "script": SCRIPT.with_name("pretrain_hybrid.py")}
    run, out = tmp_path / "run", [tmp_path / name for name in ("first", "resumed", "exported")]
    train(2, run, *given, "--export-hf", out[0], *flags("pp2"), iters=3, **options).succeed()
    sharded = ["--export-hf", out[1], *flags("tp2 sp ep2 etp1")]
    train(2, run, *given, *sharded, iters=3, **options).succeed()
    words = ["export", run, *("--hf-model", base, "--export-for", "vllm", "--output", out[2])]
    status, _, errors = call(hf_commands.run, [str(word) for word in words])
    assert status == 0, errors
    first, *others = (load_file(path / "adapter_model.safetensors") for path in out)
    for other in others:
        assert other.keys() == first.keys()
        assert all(other[key].equal(tensor) for key, tensor in first.items())
    b = first["base_model.model.model.layers.0.mixer.in_proj.lora_B.weight"]
    assert b.shape == (174, 16)
    blocks = [b[:60, :8], b[60:120, 8:], b[:60, 8:], b[60:120, :8], b[120:]]
    assert [bool(block.any()) for block in blocks] == [True, True, False, False, False]
