"""What `recommend` counts is what the builder attaches to real Megatron models."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalora.builder import apply_lora, named_adapters
from megalora.config import LoRAConfig
from megalora.recommend import Layout as GpuLayout
from megalora.recommend import ModelShape, adapter_parameters, gpu_memory, step_flops
from megalora.recommend.linears import base_parameters, linears
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import (
    DELTA_NET,
    DENSE,
    MLA,
    MOE,
    SEQ_LENGTH,
    VOCAB_SIZE,
    build_model,
)

MODES: dict[str, dict[str, Any]] = {
    "all": {},
    "attn": {"targets": ("attn",)},
    "mlp-unembed": {"targets": ("mlp", "unembed")},
    "router": {"targets": ("router", "linear_proj")},
    "expert-rank": {"expert_rank": 3},
    "shared-outer": {"expert_mode": "shared_outer"},
    "shared-a": {"shared_a": True},
    "prediction": {"targets": ("all", "eh_proj", "router")},
    "tinker": {"targets": ("tinker",), "expert_mode": "shared_outer"},
    "gates": {"delta_gates": True},
}
WITH_SHARED_EXPERT = {**MOE, "moe_shared_expert_intermediate_size": 40}


LATENT = {**MLA, "qk_layernorm": True, "v_head_dim": 12, "kv_lora_rank": 20}
DIRECT_QUERY = {**MLA, "q_lora_rank": None}
PREDICTION = {**MOE, "moe_layer_freq": [0, 0, 0, 1], "mtp_num_layers": 2}
DELTA_NET_MOE = {**DELTA_NET, **WITH_SHARED_EXPERT}
LATENT_MOE = {**LATENT, **WITH_SHARED_EXPERT, "moe_layer_freq": [0, 1, 1, 1]}


def shape_of(fields: dict[str, Any]) -> ModelShape:
    """Return the shape of `build_model(**fields)`."""
    more = {"vocab_size": VOCAB_SIZE, "multi_latent_attention": "kv_lora_rank" in fields}
    return ModelShape.from_mapping({**DENSE, **fields, **more})


def group_of(name: str) -> str:
    if "self_attention" in name:
        return "attention"
    for part, group in (
        ("router", "router"),
        ("eh_proj", "prediction"),
        (".experts.", "experts"),
        (".mlp.", "mlp"),
    ):
        if part in name:
            return group
    return "unembedding"


def attached(model: list[Any]) -> dict[str, int]:
    """Count this rank's adapter parameters by group."""
    counts = Counter[str]()
    for name, adapter in named_adapters(model):
        counts[group_of(name)] += sum(p.numel() for p in adapter.parameters())
    return dict(counts)


@over(Layout())
@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        *((mode, WITH_SHARED_EXPERT) for mode in MODES if mode not in ("prediction", "gates")),
        *((mode, {}) for mode in ("all", "attn", "mlp-unembed", "shared-a")),
        *((mode, LATENT) for mode in ("all", "attn", "shared-a")),
        ("attn", DIRECT_QUERY),
        *((mode, LATENT_MOE) for mode in ("all", "shared-outer", "tinker")),
        ("prediction", PREDICTION),
        *((mode, DELTA_NET_MOE) for mode in ("all", "attn", "shared-a", "gates", "tinker")),
    ],
)
def test_counts_are_those_of_the_built_adapters(
    layout: Layout, mode: str, fields: dict[str, Any]
) -> None:
    config = LoRAConfig(rank=4, ops="reference", **MODES[mode])
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **fields)], config)
        assert attached(model) == adapter_parameters(shape_of(fields), config)


@over(Layout())
def test_tinkers_layout_is_exactly_its_list(layout: Layout) -> None:
    # The first layer is dense, the second has experts and a shared one with a gate.
    fields = {
        **LATENT_MOE,
        "num_layers": 2,
        "moe_layer_freq": [0, 1],
        "moe_shared_expert_gate": True,
    }
    config = LoRAConfig(rank=4, ops="reference", **MODES["tinker"])
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **fields)], config)
        adapters = {name.removesuffix("_lora"): a for name, a in named_adapters(model)}
    layers = {name.removeprefix("decoder.layers.") for name in adapters} - {"output_layer"}
    attention = {"linear_q_down_proj", "linear_kv_down_proj", "linear_proj"}
    assert layers == {
        *(f"{layer}.self_attention.{name}" for layer in (0, 1) for name in attention),
        *("0.mlp.linear_fc1", "0.mlp.linear_fc2"),
        *("1.mlp.experts.linear_fc1", "1.mlp.experts.linear_fc2"),
        *("1.mlp.shared_experts.linear_fc1", "1.mlp.shared_experts.linear_fc2"),
    }
    experts = [adapters[f"decoder.layers.1.mlp.experts.linear_{fc}"] for fc in ("fc1", "fc2")]
    # Full rank; A of gate and up and B of down are one for all experts.
    assert [a.spec.rank for a in experts] == [4, 4]
    assert [(a.lora_A.dim(), a.lora_B.dim()) for a in experts] == [(2, 3), (3, 2)]


@over(Layout())
@pytest.mark.parametrize(
    "fields", [{}, WITH_SHARED_EXPERT, LATENT, DIRECT_QUERY, LATENT_MOE, PREDICTION, DELTA_NET_MOE]
)
def test_the_base_is_counted_as_megatron_builds_it(layout: Layout, fields: dict[str, Any]) -> None:
    with model_parallel(layout):
        (model,) = build_model(layout, **fields)
        built = sum(parameter.numel() for parameter in model.parameters())
    assert base_parameters(shape_of(fields)) == built


@over(Layout(tp=2, sp=True, dp=2, ep=2, etp=2), Layout(tp=2, sp=True, dp=2, ep=4, etp=1))
@pytest.mark.parametrize("mode", ["all", "shared-outer"])
def test_memory_counts_the_shards_of_a_rank(layout: Layout, mode: str) -> None:
    config = LoRAConfig(rank=4, ops="reference", **MODES[mode])
    gpus = GpuLayout(tp=layout.tp, dp=layout.dp, ep=layout.ep, etp=layout.etp, vocab_multiple=1)
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **WITH_SHARED_EXPERT)], config)
        trained = sum(p.numel() for p in model[0].parameters() if p.requires_grad)
        held = sum(p.numel() for p in model[0].parameters())
    memory = gpu_memory(shape_of(WITH_SHARED_EXPERT), config, gpus)
    assert memory.gradients == 4 * trained
    assert memory.weights == 2 * held


@over(Layout(tp=2, sp=True))
def test_memory_counts_down_projections_whole(layout: Layout) -> None:
    config = LoRAConfig(rank=4, ops="reference")
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **LATENT)], config)
        trained = sum(p.numel() for p in model[0].parameters() if p.requires_grad)
        held = sum(p.numel() for p in model[0].parameters())
    # Those of Megatron's own layers are split; TransformerEngine's, which are counted, are not.
    split = sum(
        linear.parameters for linear in linears(shape_of(LATENT)) if "_down_" in linear.name
    )
    memory = gpu_memory(shape_of(LATENT), config, GpuLayout(tp=2, vocab_multiple=1))
    assert memory.gradients == 4 * trained
    assert memory.weights == 2 * (held + split / 2)


@over(Layout())
@pytest.mark.parametrize(
    "fields",
    [{}, WITH_SHARED_EXPERT, LATENT, PREDICTION, DELTA_NET],
    ids=["dense", "moe", "latent", "prediction", "delta nets"],
)
def test_flops_are_what_torch_counts_in_megatron(layout: Layout, fields: dict[str, Any]) -> None:
    # One A for each linear: the reference ops spread B over the A of several, which costs more.
    config = LoRAConfig(rank=4, ops="reference", shared_a=True)
    shape = shape_of(fields)
    expected = step_flops(shape, config)
    # Megatron's gate computes dW though the router is frozen; the rule does not ask for it.
    wasted = sum(2 * linear.parameters for linear in linears(shape) if linear.group == "router")
    with model_parallel(layout):
        (model,) = build_model(layout, **fields)
        assert counted(model) == expected.full * SEQ_LENGTH
        apply_lora([model], config)
        # Layer 0 is counted with its dX.
        model.embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        assert counted(model) == (expected.lora + wasted) * SEQ_LENGTH


def counted(model: Any) -> int:
    """Count the FLOPs of all matrix products of a step but those inside attention."""
    tokens = torch.arange(SEQ_LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, None, labels=tokens).sum().backward()
    linears = {"aten.mm", "aten.addmm"}
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in linears)
