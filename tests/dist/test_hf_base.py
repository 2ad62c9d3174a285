"""Megatron's logits of a Hugging Face directory are transformers' logits, on every layout."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file, save_file

from megalora.hf.base import load_hf_base
from megalora.model.config_json import read_config
from megalora.model.megatron import megatron_args, megatron_flags
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.support import hf_models

TOLERANCE = 1e-4
ONE = Layout()
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "mistral": ("mistral", {}),
    "mistral-without-window": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen3": ("qwen3", {"tied": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe-plain": (
        "glm4_moe",
        {
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": False,
            "attention_bias": False,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3-plain": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            # Norms of latents have transformers' own, which differs by all of this.
            "rms_norm_eps": 0.01,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
        },
    ),
}


@functools.cache
def reference(case: str, num_layers: int = 2) -> tuple[Path, torch.Tensor]:
    """Write a tiny model's directory; return it with transformers' logits."""
    family, changes = CASES[case]
    model = hf_models.hf_model(family, num_hidden_layers=num_layers, **changes)
    path: list[Any] = [tempfile.mkdtemp(prefix="megalora-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path, src=0)
    # Only rank 0 writes: transformers makes sure of that.
    model.save_pretrained(path[0])
    dist.barrier()
    return Path(path[0]), hf_models.logits(model)


def assert_same_logits(layout: Layout, case: str, num_layers: int = 2) -> None:
    directory, expected = reference(case, num_layers)
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory), hf_models.IDS)
    torch.testing.assert_close(
        found[..., : hf_models.VOCAB], expected, atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("case", CASES)
@over(ONE)
def test_every_family_has_the_logits_of_transformers(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case)


@over(ONE)
def test_rotary_frequencies_are_those_of_the_configuration(layout: Layout) -> None:
    directory, _ = reference("llama")
    model = hf_models.hf_model("llama")
    with model_parallel(layout):
        chunk = hf.load(layout, directory)[0]
    # The factor is 32, Megatron's builder knows no other than 8.
    torch.testing.assert_close(chunk.rotary_pos_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("case", "what", "number"),
    [
        ("glm4_moe", "moe_router_topk_scaling_factor", 1.0),
        ("glm4_moe", "moe_router_num_groups", 8),
        ("glm4_moe", "moe_router_enable_expert_bias", False),
        ("qwen2_moe", "moe_shared_expert_gate", False),
    ],
)
@over(ONE)
def test_each_part_of_a_router_shows_in_the_logits(
    layout: Layout, case: str, what: str, number: float
) -> None:
    directory, expected = reference(case)
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        for module in chunks[0].modules():
            if what == "moe_router_enable_expert_bias" and hasattr(module, "expert_bias"):
                module.expert_bias = None
            if what == "moe_shared_expert_gate" and hasattr(module, "use_shared_expert_gate"):
                module.use_shared_expert_gate = False
        setattr(chunks[0].config, what, number)
        found = hf.logits(chunks, hf_models.IDS)
    assert (found[..., : hf_models.VOCAB] - expected).abs().max() > 10 * TOLERANCE


@over(ONE)
def test_the_bias_of_experts_keeps_its_precision_in_a_model_of_bf16(layout: Layout) -> None:
    directory, _ = reference("glm4_moe")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = load_file(directory / "model.safetensors")[name]
    with model_parallel(layout):
        options = {"bf16": True, "params_dtype": torch.bfloat16}
        [chunk] = hf.load(layout, directory, **options)
        wrapped = Float16Module(chunk.config, chunk)
    router = wrapped.module.decoder.layers[1].mlp.router
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias, bias)


@over(ONE)
def test_a_wrong_base_weight_shows_in_the_logits(layout: Layout) -> None:
    directory, expected = reference("qwen3_moe")
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        with torch.no_grad():
            experts = chunks[0].decoder.layers[1].mlp.experts.local_experts
            experts[10].linear_fc1.weight.neg_()
        found = hf.logits(chunks, hf_models.IDS)
    assert (found[..., : hf_models.VOCAB] - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    "case",
    ["llama", "llama-tied", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe", "glm4_moe"]
    + ["deepseek_v3", "deepseek_v3-plain"],
)
@over(Layout(tp=2), Layout(pp=2), Layout(tp=2, sp=True))
def test_dense_sharding_keeps_the_logits(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3"])
@over(Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2), Layout(tp=2, sp=True, etp=2))
def test_expert_sharding_keeps_the_logits(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case)


@over(Layout(pp=2, vpp=2))
def test_virtual_stages_keep_the_logits(layout: Layout) -> None:
    assert_same_logits(layout, "qwen3", num_layers=4)


@over(Layout(tp=4, sp=True))
def test_fewer_query_groups_than_ranks_keep_the_logits(layout: Layout) -> None:
    assert_same_logits(layout, "qwen2")


@over(Layout(tp=2, sp=True, pp=2, ep=2))
def test_all_kinds_of_sharding_at_once_keep_the_logits(layout: Layout) -> None:
    assert_same_logits(layout, "qwen3_moe")


@pytest.mark.parametrize("case", CASES)
@over(ONE)
def test_megatron_reads_the_printed_flags_as_they_are_meant(
    layout: Layout, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import parse_args

    config = read_config(reference(case)[0])
    monkeypatch.setattr("sys.argv", ["script", *megatron_flags(config)])
    args = parse_args()
    for name, value in megatron_args(config).items():
        assert getattr(args, name) in (value, [value]), name


def broken_copy(case: str, tmp_path: Path, **config: Any) -> Path:
    """Copy a directory, with other values in its config.json."""
    directory, _ = reference(case)
    whole = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**whole, **config}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen2", {"add_qkv_bias": False}, "add_qkv_bias is False, must be True"),
        ("qwen3", {"qk_layernorm": False}, "qk_layernorm is False"),
        ("mistral", {"window_size": None}, r"window_size is None, must be \(2, 0\)"),
        ("mistral", {"window_size": (3, 0)}, r"window_size is \(3, 0\), must be \(2, 0\)"),
        ("mistral", {"window_attn_skip_freq": 2}, "window_attn_skip_freq is 2, must be None"),
        ("llama", {"window_size": (2, 0)}, r"window_size is \(2, 0\), must be None"),
        ("qwen3", {"layernorm_epsilon": 1e-3}, "layernorm_epsilon is 0.001"),
        ("qwen3_moe", {"moe_router_topk": 3}, "moe_router_topk is 3, must be 2"),
        ("qwen3_moe", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ("qwen3_moe", {"moe_layer_freq": [1, 0]}, r"moe_layers is \[1, 0\]"),
        ("qwen2_moe", {"moe_shared_expert_gate": False}, "moe_shared_expert_gate is False"),
        ("glm4_moe", {"moe_router_topk_scaling_factor": 1.0}, "topk_scaling_factor is 1.0"),
        ("glm4_moe", {"moe_router_enable_expert_bias": False}, "enable_expert_bias is False"),
        ("glm4_moe", {"moe_router_num_groups": 8}, "num_groups is 8, must be 4"),
        ("glm4_moe", {"rotary_percent": 1.0}, "rotary_percent is 1.0, must be 0.5"),
        (
            "glm4_moe",
            {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
            "moe_router_score_function is 'softmax', must be 'sigmoid'",
        ),
        ("qwen3_moe", {"moe_router_topk_scaling_factor": 2.0}, "topk_scaling_factor is 2.0"),
        ("llama", {"num_moe_experts": 4, "moe_ffn_hidden_size": 40}, "num_moe_experts is 4"),
    ],
)
@over(ONE)
def test_a_model_built_with_other_options_is_refused(
    layout: Layout, case: str, changes: dict[str, Any], message: str
) -> None:
    directory, _ = reference(case)
    with model_parallel(layout):
        chunks = hf.build(layout, directory, **changes)
        with pytest.raises(ValueError, match=message):
            load_hf_base(chunks, directory)


@over(ONE)
def test_a_vocabulary_that_is_too_small_is_refused(layout: Layout, tmp_path: Path) -> None:
    directory = broken_copy("qwen3", tmp_path)
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        broken_copy("qwen3", tmp_path, vocab_size=100)
        with pytest.raises(ValueError, match=r"vocab_size 100 \(its tensors 66\)"):
            load_hf_base(chunks, directory)


@over(ONE)
def test_missing_and_unexpected_tensors_are_named_and_nothing_is_loaded(
    layout: Layout, tmp_path: Path
) -> None:
    directory = broken_copy("qwen3", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    norm = tensors.pop("model.layers.1.self_attn.q_norm.weight")
    tensors["model.layers.1.self_attn.s_norm.weight"] = norm
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        before = {name: p.clone() for name, p in chunks[0].named_parameters()}
        with pytest.raises(ValueError, match=r"missing .*q_norm.*unexpected .*s_norm"):
            load_hf_base(chunks, directory)
        assert all(torch.equal(p, before[name]) for name, p in chunks[0].named_parameters())
