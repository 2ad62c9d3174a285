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
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import DENSE, MOE, SEQ_LENGTH, VOCAB_SIZE, build_model

MODES: dict[str, dict[str, Any]] = {
    "all": {},
    "attn": {"targets": ("attn",)},
    "mlp-unembed": {"targets": ("mlp", "unembed")},
    "router": {"targets": ("router", "linear_proj")},
    "expert-rank": {"expert_rank": 3},
    "shared-outer": {"expert_mode": "shared_outer"},
    "shared-a": {"shared_a": True},
}
WITH_SHARED_EXPERT = {**MOE, "moe_shared_expert_intermediate_size": 40}


def shape_of(fields: dict[str, Any]) -> ModelShape:
    """Return the shape of `build_model(**fields)`."""
    dense: dict[str, Any] = dict(DENSE)
    experts = (
        {
            "num_experts": fields["num_moe_experts"],
            "moe_router_topk": fields["moe_router_topk"],
            "moe_ffn_hidden_size": fields["moe_ffn_hidden_size"],
            "shared_expert_size": fields["moe_shared_expert_intermediate_size"],
        }
        if fields
        else {}
    )
    return ModelShape(name="tiny", family="", vocab_size=VOCAB_SIZE, **dense, **experts)


def group_of(name: str) -> str:
    if "self_attention" in name:
        return "attention"
    for part, group in (("router", "router"), (".experts.", "experts"), (".mlp.", "mlp")):
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
        *((mode, WITH_SHARED_EXPERT) for mode in MODES),
        *((mode, {}) for mode in ("all", "attn", "mlp-unembed", "shared-a")),
    ],
)
def test_counts_are_those_of_the_built_adapters(
    layout: Layout, mode: str, fields: dict[str, Any]
) -> None:
    config = LoRAConfig(rank=4, ops="reference", **MODES[mode])
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **fields)], config)
        assert attached(model) == adapter_parameters(shape_of(fields), config)


@over(Layout(tp=2, sp=True, dp=2, ep=2, etp=2), Layout(tp=2, sp=True, dp=2, ep=4, etp=1))
@pytest.mark.parametrize("mode", ["all", "shared-outer"])
def test_memory_counts_the_shards_of_a_rank(layout: Layout, mode: str) -> None:
    config = LoRAConfig(rank=4, ops="reference", **MODES[mode])
    gpus = GpuLayout(tp=layout.tp, dp=layout.dp, ep=layout.ep, etp=layout.etp)
    with model_parallel(layout):
        model = apply_lora([*build_model(layout, **WITH_SHARED_EXPERT)], config)
        trained = sum(p.numel() for p in model[0].parameters() if p.requires_grad)
        held = sum(p.numel() for p in model[0].parameters())
    memory = gpu_memory(shape_of(WITH_SHARED_EXPERT), config, gpus)
    assert memory.gradients == 4 * trained
    assert memory.weights == 2 * held


@over(Layout())
@pytest.mark.parametrize("fields", [{}, WITH_SHARED_EXPERT], ids=["dense", "moe"])
def test_flops_are_what_torch_counts_in_megatron(layout: Layout, fields: dict[str, Any]) -> None:
    # One A for each linear: the reference ops spread B over the A of several, which costs more.
    config = LoRAConfig(rank=4, ops="reference", shared_a=True)
    shape = shape_of(fields)
    expected = step_flops(shape, config)
    # Megatron's gate computes dW though the router is frozen; the rule does not ask for it.
    wasted = sum(2 * linear.parameters for linear in shape.linears() if linear.group == "router")
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
        model(tokens, tokens, None).sum().backward()
    linears = {"aten.mm", "aten.addmm"}
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in linears)
