"""What each server takes and refuses is said before it is started, and before training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.hf.cli import READERS
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import FORMATS, write_adapter
from megalora.hf.servers import SERVERS, check_reader, choose_format, judge_export
from megalora.hf.servers.outline import Outline, outline_of_directory, outline_of_export
from megalora.hf.servers.vllm import max_lora_rank
from megalora.model.families import FAMILIES
from megalora.model.served import ServedModel

REFUSED = pytest.mark.bad_input("a malformed file")
LLAMA = ServedModel.of({"model_type": "llama", "vocab_size": 1000})
QWEN2 = ServedModel.of({"model_type": "qwen2", "vocab_size": 1000})
MOE = ServedModel.of({"model_type": "qwen3_moe", "num_experts": 3})
IN_ONE = ServedModel(architecture="Qwen3_5MoeForConditionalGeneration", num_experts=3)
GLM = ServedModel.of({"model_type": "glm4_moe"})
MIXTRAL = ServedModel.of({"model_type": "mixtral"})
QWEN2_MOE = ServedModel.of(
    {
        "model_type": "qwen2_moe",
        "intermediate_size": 18944,
        "shared_expert_intermediate_size": 20480,
    }
)
DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def module(rank: int, scale: float = 1.0, rows: int = 8) -> LoRAFactors:
    return LoRAFactors(torch.ones(rank, 8), torch.ones(rows, rank), scale)


def dense(rank: int = 4, *, head: bool = False) -> dict[str, LoRAFactors]:
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in DENSE]
    return {name: module(rank) for name in [*names, *(["lm_head"] if head else [])]}


def experts(rank: int = 2, scale: float = 1.0) -> dict[str, LoRAFactors]:
    """Return experts that share what the article's outer experts share, and attention at rank 4."""
    names = ("gate_proj", "up_proj", "down_proj")
    attention = {name: module(4) for name in dense() if "self_attn" in name}
    return attention | {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": module(rank, scale)
        for layer in range(2)
        for expert in range(3)
        for name in names
    }


def shared(place: str) -> dict[str, LoRAFactors]:
    """Return attention and shared experts."""
    attention = {name: module(4) for name in dense() if "self_attn" in name}
    names = ("gate_proj", "up_proj", "down_proj")
    return attention | {f"model.layers.1.{place}.{name}": module(4) for name in names}


def outline(factors: dict[str, LoRAFactors] | None = None, **config: Any) -> Outline:
    """Return an outline whose configuration has these fields too."""
    found = outline_of_export(factors or dense(), "peft")
    return dataclasses.replace(found, config={**found.config, **config})


def problems(server: str, of: Outline, model: ServedModel = LLAMA) -> str:
    return "; ".join(SERVERS[server].judge(of, model).problems)


CASES = {
    # vLLM: what it refuses by name, by rank, by field.
    ("vllm", "an unembedding of Qwen2"): (
        outline(dense(head=True)),
        QWEN2,
        "no adapter of lm_head",
    ),
    ("vllm", "an unembedding of Llama"): (outline(dense(head=True)), LLAMA, ""),
    ("vllm", "rank 512"): (outline(dense(512)), LLAMA, ""),
    ("vllm", "rank 513"): (outline(dense(513)), LLAMA, "no rank above 512, this adapter has 513"),
    ("vllm", "DoRA"): (outline(use_dora=True), LLAMA, "does not read use_dora"),
    ("vllm", "PiSSA"): (outline(init_lora_weights="pissa"), LLAMA, "init_lora_weights=pissa"),
    ("vllm", "a start of EVA"): (outline(init_lora_weights="eva"), LLAMA, ""),
    ("vllm", "rsLoRA"): (outline(use_rslora=True), LLAMA, ""),
    ("vllm", "patterns"): (outline(experts()), MOE, ""),
    ("vllm", "no LoRA at all"): (
        outline(),
        ServedModel(architecture="DbrxForCausalLM"),
        "has no LoRA",
    ),
    # SGLang: one rank, one scale, whole fused modules.
    ("sglang", "an unembedding of Qwen2"): (outline(dense(head=True)), QWEN2, ""),
    ("sglang", "two ranks"): (outline(experts()), MOE, "takes one rank, r 2"),
    ("sglang", "a pattern of scales"): (
        outline(alpha_pattern={"q_proj": 9}),
        LLAMA,
        "does not read alpha_pattern",
    ),
    ("sglang", "a pattern that changes nothing"): (outline(alpha_pattern={"q_proj": 4}), LLAMA, ""),
    ("sglang", "rsLoRA"): (outline(use_rslora=True), LLAMA, "does not read use_rslora"),
    ("sglang", "DoRA"): (outline(use_dora=True), LLAMA, "does not read use_dora"),
    ("sglang", "a pattern of names"): (outline(target_modules="q|v"), LLAMA, "as a list of names"),
    ("sglang", "all linears"): (outline(target_modules="all-linear"), LLAMA, ""),
    ("sglang", "a router"): (
        outline({**dense(), "model.layers.0.mlp.gate": module(4)}),
        MOE,
        "has no LoRA for gate",
    ),
    ("sglang", "a router that is not named"): (
        outline({**dense(), "model.layers.0.mlp.gate": module(4)}, target_modules=["q_proj"]),
        MOE,
        "has no LoRA for gate",
    ),
    ("sglang", "Mixtral's letters in target_modules"): (
        outline(target_modules=["q_proj", "k_proj", "v_proj", "w1", "w2", "w3"]),
        MIXTRAL,
        "knows w1, w2, w3 in tensors' names",
    ),
    ("sglang", "a shared expert of another width"): (
        outline(shared("mlp.shared_expert")),
        QWEN2_MOE,
        "shared_expert_intermediate_size is 20480",
    ),
    ("sglang", "a shared expert as wide as a dense MLP"): (
        outline(shared("mlp.shared_expert")),
        dataclasses.replace(QWEN2_MOE, intermediate_size=20480),
        "",
    ),
    ("sglang", "q alone"): (
        outline({"model.layers.0.self_attn.q_proj": module(4)}),
        LLAMA,
        "has adapters of q_proj alone",
    ),
    ("sglang", "up alone"): (
        outline({"model.layers.0.mlp.up_proj": module(4)}),
        LLAMA,
        "none of gate_proj",
    ),
    ("sglang", "experts' down alone"): (
        outline({"model.layers.0.mlp.experts.0.down_proj": module(4)}),
        MOE,
        "where gate, up and down all have",
    ),
    ("peft", "experts it converts"): (outline(experts()), MOE, ""),
    ("peft", "experts it does not"): (outline(experts()), IN_ONE, "loads none of the experts"),
    ("peft", "experts that only their projections name"): (
        outline(experts(), target_parameters=None),
        QWEN2_MOE,
        "loads none of the experts",
    ),
    ("peft", "experts that their parameters name"): (outline(experts()), QWEN2_MOE, ""),
    ("peft", "shared experts that their weights name"): (
        outline(shared("mlp.shared_experts")),
        GLM,
        "",
    ),
    ("peft", "shared experts as linears"): (
        outline(shared("mlp.shared_experts"), target_parameters=None),
        GLM,
        "mlp.shared_experts.down_proj, model.layers.1.mlp.shared_experts.gate_proj",
    ),
    ("peft", "an unembedding of Qwen2"): (outline(dense(head=True)), QWEN2, ""),
    ("tinker", "two ranks"): (outline(experts()), MOE, "has one rank"),
    ("tinker", "single experts"): (outline(experts()), MOE, "as experts.w1, w2 and w3"),
    ("tinker", "lm_head"): (outline(dense(head=True)), LLAMA, "unembed_tokens"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: ": ".join(case))
@REFUSED
def test_a_server_refuses_what_its_source_refuses(case: tuple[str, str]) -> None:
    of, model, refused = CASES[case]
    found = problems(case[0], of, model)
    assert refused in found
    assert bool(refused) == bool(found)


@pytest.mark.parametrize(
    ("rows", "head", "refused"),
    [(258_048, True, ""), (258_049, True, "up to 258048 rows"), (258_049, False, "")],
)
def test_vllm_adapts_vocabularies_up_to_a_size(rows: int, head: bool, refused: str) -> None:
    model = dataclasses.replace(LLAMA, vocab_size=rows)
    verdict = SERVERS["vllm"].judge(outline(dense(head=head)), model)
    assert refused in "".join(verdict.problems)
    assert verdict.accepted == (not refused)
    # Else it makes room for adapters of lm_head all the same.
    assert ("--lora-target-modules" in verdict.flags) == (rows > 258_048 and not head)


def test_a_size_that_holds_no_lm_head_adapters_does_not_matter_without_them() -> None:
    gemma = ServedModel(architecture="Gemma3ForCausalLM", vocab_size=262_208)
    assert SERVERS["vllm"].judge(outline(), gemma).flags[2:] == ["8"]


@pytest.mark.parametrize(
    ("rank", "limit"), [(1, 1), (2, 8), (16, 16), (17, 32), (256, 256), (257, 320), (513, None)]
)
def test_the_smallest_max_lora_rank_that_fits_is_said(rank: int, limit: int | None) -> None:
    assert max_lora_rank(rank) == limit


def test_every_reader_can_be_named_on_the_command_line() -> None:
    assert tuple(SERVERS) == READERS


@pytest.mark.parametrize(
    ("server", "model", "shares_outer", "format"),
    [
        (None, MOE, True, "peft"),
        ("peft", MOE, False, "peft"),
        ("peft", IN_ONE, False, "peft-3d"),
        ("vllm", MOE, True, "peft"),
        ("vllm", IN_ONE, False, "peft-3d"),
        ("sglang", MOE, False, "uniform"),
        ("sglang", MOE, True, "tinker"),
        ("tinker", MOE, True, "tinker"),
    ],
)
def test_the_server_decides_the_format(
    server: str | None, model: ServedModel, shares_outer: bool, format: str
) -> None:
    assert choose_format(server, None, model, shares_outer=shares_outer) == format


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("factors", [dense(), dense(head=True), experts(), experts(4, 2.0)])
def test_what_a_server_gets_by_default_it_takes(
    server: str, factors: dict[str, LoRAFactors]
) -> None:
    model = MOE if any("experts" in name for name in factors) else LLAMA
    format = choose_format(server, None, model, shares_outer=True)
    assert judge_export(factors, format, model, server)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("factors", [dense(head=True), experts(), experts(4, 2.0)])
def test_the_outline_of_an_export_is_that_of_what_is_written(
    factors: dict[str, LoRAFactors], format: Any, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", factors, base_model_name="base", format=format)
    written = outline_of_directory(tmp_path / "adapter")
    planned = outline_of_export(factors, format)
    assert planned.ranks == written.ranks
    assert planned.largest_rank == written.largest_rank
    model = MOE if any("experts" in name for name in factors) else LLAMA
    for name, server in SERVERS.items():
        assert server.judge(planned, model) == server.judge(written, model), name


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (("vllm", None, "dir"), ""),
        (("vllm", "uniform", "dir"), ""),
        ((None, "peft-3d", "dir"), ""),
        (("sglang", "peft-3d", "dir"), "format 'peft-3d' and export_for 'sglang' contradict"),
        (("peft", "tinker", "dir"), "format 'tinker' and export_for 'peft' contradict"),
        (("vllm", None, None), "export_for is 'vllm' and nothing is exported"),
    ],
)
@REFUSED
def test_a_contradiction_names_both(flags: tuple[Any, Any, str | None], refused: str) -> None:
    name, format, export = flags
    if not refused:
        check_reader(name, format, export=export)
        return
    with pytest.raises(ValueError, match=refused):
        check_reader(name, format, export=export)


@REFUSED
def test_an_export_for_a_server_that_refuses_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="train with --lora-targets attn mlp"):
        judge_export(dense(head=True), "peft", QWEN2, "vllm")


def test_an_export_for_nobody_warns_once_of_all_that_vllm_refuses() -> None:
    model = dataclasses.replace(QWEN2, vocab_size=300_000)
    [line] = judge_export(dense(600, head=True), "peft", model, None)
    assert "no rank above 512" in line
    assert "no adapter of lm_head" in line
    assert judge_export(dense(), "peft", QWEN2, None) == []


def test_every_family_of_ours_is_in_the_table() -> None:
    for name in FAMILIES:
        assert ServedModel.of({"model_type": name}).vllm_lora, name
