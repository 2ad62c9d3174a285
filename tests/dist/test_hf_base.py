"""Megatron's logits of a Hugging Face directory are transformers' logits, on every layout."""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file, save_file

from megalora.hf.base import load_hf_base
from megalora.hf.rotary import latent_attentions, set_rotary
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
    "llama-yarn": ("llama", {"rope_parameters": hf_models.YARN}),
    "mistral": ("mistral", {}),
    "mistral-without-window": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**hf_models.YARN, "mscale": 0.7}}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen3": ("qwen3", {"tied": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-yarn": ("qwen3_moe", {"rope_parameters": hf_models.YARN}),
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
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-plain": (
        "gpt_oss",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
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
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h-dense": ("nemotron_h", {"hybrid_override_pattern": "M-M*-M"}),
    # Of experts that read and write 20 of 32 features.
    "nemotron_h-latent": ("nemotron_h", {"moe_latent_size": 20}),
    "nemotron_h-groups": (
        "nemotron_h",
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next-mixed": (
        "qwen3_next",
        {"mlp_only_layers": [0], "norm_topk_prob": False, "num_key_value_heads": 4},
    ),
    "qwen3_5_text": ("qwen3_5_text", {"tied": True}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen3_vl": ("qwen3_vl", {"tied": True}),
    "qwen3_vl-yarn": ("qwen3_vl", {"rope_parameters": hf_models.YARN}),
    "mistral3": ("mistral3", {"sliding_window": 3}),
    # Parts of multimodal directories, as they are published, and by themselves.
    "qwen3_5_moe": ("qwen3_5_moe", {}),
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


def assert_same_logits(layout: Layout, case: str, num_layers: int = 2, **options: Any) -> None:
    directory, expected = reference(case, num_layers)
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory, **options), hf_models.IDS)
    torch.testing.assert_close(
        found[..., : hf_models.VOCAB], expected, atol=TOLERANCE, rtol=TOLERANCE
    )


def assert_shows(layout: Layout, case: str, change: Callable[[Any], None]) -> None:
    """A change of a loaded model moves its logits further from transformers' than rounding does."""
    directory, expected = reference(case)
    with model_parallel(layout), torch.no_grad():
        chunks = hf.load(layout, directory)
        change(chunks[0])
        changed = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    assert (changed - expected).abs().max() > 10 * TOLERANCE


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


def yarn(chunk: Any, **changes: float) -> None:
    """Give all layers' rotary embeddings other numbers."""
    for attention in latent_attentions(chunk):
        for name, value in changes.items():
            assert hasattr(attention.rotary_pos_emb, name)
            setattr(attention.rotary_pos_emb, name, value)
    attention.rotary_pos_emb.forward.cache_clear()


def scores(chunk: Any, factor: float) -> None:
    for attention in latent_attentions(chunk):
        attention.core_attention.softmax_scale *= factor


def norms_of_latents(chunk: Any, eps: float) -> None:
    for attention in latent_attentions(chunk):
        attention.q_layernorm.eps = attention.kv_layernorm.eps = eps


def norms_of_keys(chunk: Any, eps: float) -> None:
    for attention in latent_attentions(chunk):
        attention.kv_layernorm.eps = eps


LATENT_PARTS = {
    "the scaling": ("deepseek_v3", functools.partial(yarn, scaling_factor=1.0)),
    "where it begins": ("deepseek_v3", functools.partial(yarn, beta_fast=0.2)),
    "where it ends": ("deepseek_v3", functools.partial(yarn, beta_slow=0.01)),
    "the length before": (
        "deepseek_v3",
        functools.partial(yarn, original_max_position_embeddings=64),
    ),
    "the size of cosines": ("deepseek_v3", functools.partial(yarn, mscale=0.6)),
    "the size of scores": ("deepseek_v3", functools.partial(scores, factor=1 / 1.125**2)),
    "norms of latents": ("deepseek_v3", functools.partial(norms_of_latents, eps=0.01)),
    "without a latent of queries": (
        "deepseek_v3-plain",
        functools.partial(norms_of_keys, eps=0.01),
    ),
}


@pytest.mark.parametrize("part", LATENT_PARTS)
@over(ONE)
def test_each_part_of_attention_through_latents_shows_in_the_logits(
    layout: Layout, part: str
) -> None:
    case, change = LATENT_PARTS[part]
    directory, expected = reference(case)
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        change(chunks[0])
        changed = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (changed - expected).abs().max() > 10 * TOLERANCE


# Kimi-K2's, and others by which transformers takes another path.
SCALINGS: list[dict[str, Any]] = [
    {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"beta_fast": None, "beta_slow": None, "mscale": None, "mscale_all_dim": None},
    {"mscale": 0.7, "mscale_all_dim": None},
    {"mscale": 0.7, "mscale_all_dim": 1.0, "factor": 3.0},
]


@pytest.mark.parametrize("changes", SCALINGS, ids=str)
@over(ONE)
def test_yarn_scales_as_that_of_transformers(layout: Layout, changes: dict[str, Any]) -> None:
    config = hf_models.hf_config("deepseek_v3")
    config.rope_parameters = {**config.rope_parameters, **changes}
    theirs = hf_models.hf_model_of(config)
    args = megatron_args({**config.to_dict(), "rope_parameters": config.rope_parameters})
    with model_parallel(layout):
        directory, _ = reference("deepseek_v3")
        scaled = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
        chunk = hf.build(layout, directory, **{name: args[name] for name in scaled})[0]
        set_rotary(chunk, config.to_dict())
    attention, own = latent_attentions(chunk)[0], theirs.model.layers[0].self_attn
    angles, factor = attention.rotary_pos_emb(16)
    expected = theirs.model.rotary_emb
    torch.testing.assert_close(angles[1, 0, 0, :3], expected.inv_freq)
    assert factor == pytest.approx(expected.attention_scaling)
    assert attention.softmax_scale == pytest.approx(own.scaling)


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
    [
        "llama",
        "llama-tied",
        "llama-yarn",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3_moe",
        "glm4_moe",
    ]
    + ["deepseek_v3", "deepseek_v3-plain", "qwen3_next", "qwen3_5_text", "qwen3_5_moe", "qwen3_vl"]
    + ["gpt_oss", "nemotron_h", "phi3"],
)
@over(Layout(tp=2), Layout(pp=2), Layout(tp=2, sp=True))
def test_dense_sharding_keeps_the_logits(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case)


@pytest.mark.parametrize(
    "case",
    ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "gpt_oss"]
    + ["qwen3_next", "nemotron_h", "nemotron_h-latent"],
)
@over(Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2), Layout(tp=2, sp=True, etp=2))
def test_expert_sharding_keeps_the_logits(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case)


@over(ONE, Layout(tp=2), Layout(tp=2, sp=True))
def test_a_joint_down_projection_keeps_the_logits(layout: Layout) -> None:
    assert_same_logits(layout, "deepseek_v3", mla_down_proj_fusion=True)


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
        ("mistral", {"window_attn_skip_freq": 2}, r"window_layers is \[1, 0\], must be \[1, 1\]"),
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
        ("llama", {"mtp_num_layers": 1}, "mtp_num_layers is 1, must be 0"),
        ("qwen3_next", {"linear_attention_freq": [0, 1]}, r"freq is \[0, 1\], must be \[1, 0\]"),
        ("qwen3_next", {"linear_key_head_dim": 8}, "linear_key_head_dim is 8, must be 6"),
        ("qwen3_next", {"layernorm_zero_centered_gamma": False}, "centered_gamma is False"),
        ("qwen3_5_text", {"attention_output_gate": False}, "attention_output_gate is False"),
        ("qwen3_5_text", {"rotary_percent": 1.0}, "rotary_percent is 1.0, must be 0.25"),
        ("qwen3", {"attention_output_gate": True}, "attention_output_gate is True, must be False"),
        ("deepseek_v3", {"q_lora_rank": 16}, "q_lora_rank is 16, must be 20"),
        ("deepseek_v3-plain", {"q_lora_rank": 16}, "q_lora_rank is 16, must be None"),
        ("deepseek_v3", {"kv_lora_rank": 14}, "kv_lora_rank is 14, must be 12"),
        ("deepseek_v3", {"qk_head_dim": 12}, "qk_head_dim is 12, must be 10"),
        ("deepseek_v3", {"qk_pos_emb_head_dim": 8}, "qk_pos_emb_head_dim is 8, must be 6"),
        ("deepseek_v3", {"v_head_dim": 12}, "v_head_dim is 12, must be 14"),
        ("deepseek_v3", {"rope_type": "rope"}, "rope_type is 'rope', must be 'yarn'"),
        ("deepseek_v3", {"rotary_scaling_factor": 4.0}, "rotary_scaling_factor is 4.0, must be 8"),
        ("deepseek_v3", {"mscale": 0.5}, "mscale is 0.5, must be 1.0"),
        ("deepseek_v3", {"mscale_all_dim": 0.5}, "mscale_all_dim is 0.5, must be 0.6"),
        ("deepseek_v3", {"rotary_base": 10}, "rotary_base is 10, must be 100"),
        ("deepseek_v3", {"mtp_num_layers": 2}, "mtp_num_layers is 2, must be 1"),
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
def test_kimi_k2_is_deepseek_v3_under_another_name(layout: Layout, tmp_path: Path) -> None:
    # Its class is code beside its weights: config.json names DeepSeek-V3's in architectures.
    directory = broken_copy("deepseek_v3", tmp_path, model_type="kimi_k2")
    _, expected = reference("deepseek_v3")
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory), hf_models.IDS)
    torch.testing.assert_close(
        found[..., : hf_models.VOCAB], expected, atol=TOLERANCE, rtol=TOLERANCE
    )


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
