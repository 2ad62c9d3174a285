"""The verdicts on vLLM are those of its own reader of adapters.

`make servers` fetches it; without it these tests skip. What runs of it, and what are stubs,
tests/support/vllm_reader.py says.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megalora.hf.peft import FORMATS
from megalora.hf.servers.verdict import Verdict
from megalora.model import served
from megalora.model.served import ServedModel
from tests.support import vllm_classes, vllm_reader
from tests.support.served_adapters import (
    FAMILIES,
    TENSORS,
    change_tensors,
    config_of,
    factors_of,
    rewrite,
    verdict,
    written,
)
from tests.support.server_stubs import SERVERS

has_vllm = pytest.mark.skipif(
    not (SERVERS / vllm_classes.FOLDER).is_dir(), reason="vLLM's reader is not there: make servers"
)


@pytest.fixture(scope="module")
def vllm() -> Iterator[vllm_reader.Reader]:
    with vllm_reader.vllm() as reader:
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


@pytest.mark.parametrize("format", ["peft", "peft-3d"])
@has_vllm
def test_vllm_serves_without_experts_that_are_named_as_transformers_5_loads_them(
    format: str, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of("mixtral")
    directory = written(tmp_path, factors_of("mixtral", (2, 4), head=True), format, "mixtral")
    path = directory / "adapter_model.safetensors"
    tensors = {n.replace("block_sparse_moe", "mlp"): t for n, t in load_file(path).items()}
    save_file(tensors, path)
    found = verdict("vllm", directory, config)
    assert "block_sparse_moe.experts" in "".join(found.problems)
    assert "serves without" in vllm.refusal(directory, config, **vllm_flags(found))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
@has_vllm
def test_vllm_serves_a_multimodal_model_without_what_names_its_language_model_alone(
    family: str, vllm: vllm_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=False), "peft-3d", family)
    path = directory / "adapter_model.safetensors"
    tensors = {n.replace("language_model.", ""): t for n, t in load_file(path).items()}
    save_file(tensors, path)
    found = verdict("vllm", directory, config)
    assert "model.language_model.layers.0." in "".join(found.problems)
    assert "serves without" in vllm.refusal(directory, config, **vllm_flags(found))


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
    registered = vllm_classes.registered()
    assert len(registered) > 100
    for name in served.architectures_in_vllm():
        cls, model = registered[name], ServedModel(architecture=name)
        bases = set(vllm_classes.bases_of(cls))
        assert model.vllm_lora == ("SupportsLoRA" in bases), name
        in_one = vllm_classes.declaration(cls, "is_3d_moe_weight")
        assert model.vllm_experts_in_one == (in_one is not None and in_one.value is True), name
        if model.vllm_lora:
            assert model.vllm_unembedding == vllm_classes.takes_unembedding(cls), name
