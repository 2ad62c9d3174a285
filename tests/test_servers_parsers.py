"""The verdicts on servers are those of their own code, of vLLM's and SGLang's readers of adapters.

`make servers` fetches them; without them these tests skip. What runs of them, and what are stubs,
tests/support/{vllm,sglang}_reader.py say.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import FORMATS, write_adapter
from megalora.hf.servers import SERVERS
from megalora.hf.servers.outline import outline_of_directory
from megalora.hf.servers.verdict import Verdict
from megalora.model import served
from megalora.model.served import ServedModel
from tests.support import sglang_reader, vllm_reader
from tests.support.server_stubs import SERVERS as PLACE

HIDDEN, ROWS, LAYERS, EXPERTS, FFN = 16, 40, 2, 12, 8
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
has_vllm = pytest.mark.skipif(
    not (PLACE / vllm_reader.FOLDER).is_dir(), reason="vLLM's reader is not there: make servers"
)
has_sglang = pytest.mark.skipif(
    not (PLACE / sglang_reader.FOLDER).is_dir(), reason="SGLang's reader is not there: make servers"
)


def config_of(family: str) -> SimpleNamespace:
    """Return a configuration as transformers has it."""
    moe = {"num_experts": EXPERTS, "moe_intermediate_size": FFN} if "moe" in family else {}
    return SimpleNamespace(
        model_type=family,
        architectures=[FAMILIES[family]],
        hidden_size=HIDDEN,
        intermediate_size=2 * FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=ROWS,
        **moe,
    )


def factors_of(family: str, ranks: tuple[int, int], *, head: bool) -> dict[str, LoRAFactors]:
    """Return adapters of all modules; ranks: of the experts, and of everything else.

    Experts share what shared-outer ones share.
    """
    attention = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    wide = {"gate_proj": (16, 16), "up_proj": (16, 16), "down_proj": (16, 16)}
    narrow = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
    found: dict[str, LoRAFactors] = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{n}": made(ranks[1], s) for n, s in attention.items()}
        if "moe" not in family:
            found |= {f"{prefix}.mlp.{n}": made(ranks[1], s) for n, s in wide.items()}
            continue
        for name, size in narrow.items():
            first = made(ranks[0], size)
            for expert in range(EXPERTS):
                new = made(ranks[0], size)
                shared = (
                    {"lora_B": first.lora_B} if name == "down_proj" else {"lora_A": first.lora_A}
                )
                found[f"{prefix}.mlp.experts.{expert}.{name}"] = dataclasses.replace(new, **shared)
    return found | ({"lm_head": made(ranks[1], (HIDDEN, ROWS))} if head else {})


def made(rank: int, size: tuple[int, int]) -> LoRAFactors:
    return LoRAFactors(torch.randn(rank, size[0]), torch.randn(size[1], rank), 2.0)


def written(place: Path, factors: dict[str, LoRAFactors], format: Any, family: str) -> Path:
    count = EXPERTS if "moe" in family else None
    directory = place / "adapter"
    write_adapter(directory, factors, base_model_name="b", format=format, num_experts=count)
    return directory


def verdict(server: str, directory: Path, config: SimpleNamespace) -> Verdict:
    model = ServedModel.of(vars(config))
    return SERVERS[server].judge(outline_of_directory(directory), model)


@pytest.fixture(scope="module")
def vllm() -> Iterator[vllm_reader.Reader]:
    with vllm_reader.vllm() as reader:
        yield reader


@pytest.fixture(scope="module")
def sglang() -> Iterator[sglang_reader.Reader]:
    with sglang_reader.sglang() as reader:
        yield reader


SWITCHES = ("--enable-mixed-moe-lora-format", "--enable-moe-shared-loras")


def vllm_flags(found: Verdict) -> dict[str, Any]:
    """Return the fields of vLLM's LoRAConfig, and of the request, that a verdict asks for."""
    fields: dict[str, Any] = {}
    if "--max-lora-rank" in found.flags:
        fields["max_lora_rank"] = int(found.flags[found.flags.index("--max-lora-rank") + 1])
    if "--lora-target-modules" in found.flags:
        start = found.flags.index("--lora-target-modules") + 1
        fields["target_modules"] = [f for f in found.flags[start:] if not f.startswith("--")]
    for switch in SWITCHES:
        fields[switch.removeprefix("--").replace("-", "_")] = switch in found.flags
    return {**fields, "is_3d_lora_weight": any("is_3d_lora" in w for w in found.warnings)}


@pytest.mark.parametrize("head", [True, False], ids=["lm_head", "no lm_head"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
@has_vllm
def test_vllm_agrees(
    family: str, format: str, head: bool, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=head), format, family)
    found = verdict("vllm", directory, config)
    refusal = vllm.refusal(directory, config, **vllm_flags(found))
    assert found.accepted == (not refusal), (found, refusal)


@pytest.mark.parametrize(
    ("family", "format", "missing"),
    [
        ("qwen3_moe", "peft-3d", "enable_mixed_moe_lora_format"),
        ("qwen3_moe", "peft-3d", "is_3d_lora_weight"),
        ("qwen3_moe", "tinker", "enable_moe_shared_loras"),
        ("qwen3_vl_moe", "peft", "enable_mixed_moe_lora_format"),
    ],
)
@has_vllm
def test_vllm_needs_each_flag_that_is_said(
    family: str, format: str, missing: str, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=False), format, family)
    flags = vllm_flags(verdict("vllm", directory, config))
    assert vllm.refusal(directory, config, **flags) == ""
    assert vllm.refusal(directory, config, **{**flags, missing: False})


@pytest.mark.parametrize("rank", [8, 9])
@has_vllm
def test_vllm_needs_the_largest_rank_that_is_said(
    rank: int, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of("llama")
    directory = written(tmp_path, factors_of("llama", (1, rank), head=False), "peft", "llama")
    flags = vllm_flags(verdict("vllm", directory, config))
    assert vllm.refusal(directory, config, **flags) == ""
    assert "greater than max_lora_rank" in vllm.refusal(directory, config, max_lora_rank=rank - 1)


@pytest.mark.parametrize("head", [True, False], ids=["lm_head", "no lm_head"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
@has_vllm
def test_vllm_agrees_on_a_large_vocabulary(
    family: str, head: bool, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (1, 4), head=head), "peft", family)
    config.vocab_size = 258_049
    found = verdict("vllm", directory, config)
    refusal = vllm.refusal(directory, config, **vllm_flags(found))
    assert found.accepted == (not refusal), (found, refusal)
    plain = vllm.refusal(directory, config, max_lora_rank=8)
    assert bool(plain) == (head or family == "llama")


CHANGES: dict[str, dict[str, Any]] = {
    **{name: {name: True} for name in ("use_dora", "lora_bias", "use_qalora")},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "activated": {"alora_invocation_tokens": [1]},
    "replicated layers": {"layer_replication": [[0, 1]]},
    "rsLoRA": {"use_rslora": True},
    "unused": {"use_dora": False, "use_bdlora": None, "layer_replication": []},
}


@pytest.mark.parametrize("change", CHANGES)
@has_vllm
def test_vllm_agrees_on_what_a_configuration_says(
    change: str, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of("llama")
    directory = written(tmp_path, factors_of("llama", (1, 4), head=False), "peft", "llama")
    rewrite(directory, **CHANGES[change])
    found = verdict("vllm", directory, config)
    assert found.accepted == (not vllm.refusal(directory, config, **vllm_flags(found)))


def rewrite(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# What others leave out of, or put into, an adapter: names that are dropped, and added.
TENSORS = {
    "nothing": ("^$", None),
    "k": (r"k_proj", None),
    "q": (r"q_proj", None),
    "v": (r"v_proj", None),
    "up": (r"up_proj", None),
    "gate": (r"gate_proj", None),
    "down": (r"down_proj", None),
    "one expert": (r"experts\.3\.", None),
    "down of one expert": (r"experts\.3\.down_proj", None),
    "a magnitude": ("^$", "model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    "a whole layer": ("^$", "model.layers.0.input_layernorm.weight"),
    "an embedding's copy": ("^$", "model.embed_tokens.base_layer.weight"),
}


def change_tensors(directory: Path, change: str) -> None:
    """Drop and add tensors, and name in target_modules what is left."""
    dropped, added = TENSORS[change]
    path = directory / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not re.search(dropped, n)}
    leaves = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    if added:
        tensors[f"base_model.model.{added}"] = torch.ones(2)
    save_file(tensors, path)
    rewrite(directory, target_modules=sorted(leaves))


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@has_vllm
def test_vllm_agrees_on_adapters_of_some_modules(
    family: str, change: str, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=False), "peft", family)
    change_tensors(directory, change)
    found = verdict("vllm", directory, config)
    refusal = vllm.refusal(directory, config, **vllm_flags(found))
    assert found.accepted == (not refusal), (found, refusal)


@has_vllm
def test_the_table_says_what_vllms_classes_declare() -> None:
    registered = vllm_reader.registered()
    assert len(registered) > 100
    for name in served.architectures_in_vllm():
        cls, model = registered[name], ServedModel(architecture=name)
        bases = set(vllm_reader.bases_of(cls))
        assert model.vllm_lora == ("SupportsLoRA" in bases), name
        in_one = vllm_reader.declaration(cls, "is_3d_moe_weight")
        assert model.vllm_experts_in_one == (in_one is not None and in_one.value is True), name
        if model.vllm_lora:
            assert model.vllm_unembedding == vllm_reader.takes_unembedding(cls), name


@pytest.mark.parametrize("head", [True, False], ids=["lm_head", "no lm_head"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@has_sglang
def test_sglang_agrees(
    family: str, format: str, head: bool, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=head), format, family)
    found, refusal = verdict("sglang", directory, config), sglang.refusal(directory, config)
    assert found.accepted == (not refusal), (found, refusal)


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@has_sglang
def test_sglang_agrees_on_adapters_of_some_modules(
    family: str, change: str, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (4, 4), head=False), "uniform", family)
    change_tensors(directory, change)
    found, refusal = verdict("sglang", directory, config), sglang.refusal(directory, config)
    served_whole = not refusal and not lost(sglang, directory, config)
    assert found.accepted == served_whole, (found, refusal)


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        ({"use_rslora": True}, True),
        ({"alpha_pattern": {"q_proj": 99}}, True),
        ({"use_dora": True}, False),
        ({"target_modules": "q_proj|v_proj"}, False),
        ({"target_modules": "all-linear"}, True),
    ],
)
@has_sglang
def test_sglang_loads_wrongly_what_is_refused_here(
    change: dict[str, Any], loads: bool, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of("llama")
    directory = written(tmp_path, factors_of("llama", (1, 4), head=False), "uniform", "llama")
    rewrite(directory, **change)
    assert (sglang.refusal(directory, config) == "") == loads
    scaled = sglang.load(directory, config).loras["adapter"].scaling if loads else 0
    accepted = verdict("sglang", directory, config).accepted
    # Its scale is lora_alpha / r, whatever else is said.
    assert accepted == (loads and "target_modules" in change)
    assert scaled in (0, 1)


def lost(reader: sglang_reader.Reader, directory: Path, config: SimpleNamespace) -> bool:
    """Say whether SGLang takes an adapter and serves less than all of it."""
    factors = load_file(directory / "adapter_model.safetensors")
    given = sum(float(t.abs().sum()) for n, t in factors.items() if "lora_A" in n)
    pool = reader.load(directory, config).memory_pool
    slot = pool.uid_to_buffer_id["adapter"]
    places = [layer[slot] for layers in pool.A_buffer.values() for layer in layers]
    kept = sum(float(place.abs().sum()) for place in places)
    others = any("lora_" not in n and "base_layer" not in n for n in factors)
    others = others or any("magnitude" in n for n in factors)
    return others or abs(given - kept) > 1e-3 * given
