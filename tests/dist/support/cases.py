"""The matrix of layouts and kinds of models in which adapters are compared with the oracle.

A kind is there for the layers that only it has, a case for what only it can break.
"""

import dataclasses
from typing import Any

import torch

from tests.dist.support.answers import Answers
from tests.dist.support.layouts import Layout
from tests.dist.support.models import DELTA, DELTA_NET, DSA, GPT_OSS, MAMBA, MLA, MOE
from tests.dist.support.training import Run


@dataclasses.dataclass(frozen=True)
class Kind:
    """model: arguments of build_model; lora: fields of LoRAConfig."""

    model: dict[str, Any]
    lora: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the matrix; `fields` of the configuration must change no number."""

    layout: Layout
    kind: str = "dense"
    note: str = ""
    run: Run = dataclasses.field(default_factory=Run)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    ops: str = "fused"

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of weights and activations."""
        half = torch.float16 if self.fields.get("fp16") else torch.float32
        return torch.bfloat16 if self.fields.get("bf16") else half

    def __str__(self) -> str:
        """Name the case, as in `tp2-sp moe, distributed optimizer`."""
        return f"{self.layout} {self.kind}" + (f", {self.note}" if self.note else "")


def _hybrid(pattern: str, *, lora: dict[str, Any] | None = None, **model: Any) -> Kind:
    return Kind({"pattern": pattern, **MAMBA, **model}, lora or {})


def _kind(*, lora: dict[str, Any] | None = None, layers: int = 1, **model: Any) -> Kind:
    return Kind({"num_layers": layers, **model}, lora or {})


UNGATED = {
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
    "normalization": "LayerNorm",
}
SHARED_EXPERTS = {"moe_shared_expert_intermediate_size": 32}
# Large enough to be a good part of the gradient.
BALANCED = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.5, 0.5],
    "moe_z_loss_coeff": 0.05,
}
# As DeepSeek-V3 chooses experts, and what GLM-4.5 has beside.
CHOSEN_BY_SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
}
GLM = {"rotary_percent": 0.5, "qk_layernorm": True, "add_qkv_bias": True}
WITH_ROUTER = {"targets": ("all", "router")}
KINDS = {
    "dense": _kind(layers=2),
    # Its gradient is rounded to bf16, in the oracle too.
    "fused cross entropy": _kind(cross_entropy_loss_fusion=True),
    "dense of 4 layers": _kind(layers=4),
    "sliding window": _kind(layers=2, window_size=(3, 0), window_attn_skip_freq=2),
    "tied embeddings": _kind(layers=2, tied=True),
    "ungated with biases": _kind(**UNGATED, add_bias_linear=True),
    "unembedding alone": _kind(layers=2, lora={"targets": ("unembed",)}),
    "padded vocabulary": _kind(vocab_size=72, lora={"targets": ("unembed", "linear_proj")}),
    "shared A": _kind(lora={"shared_a": True}),
    "2 query groups": _kind(num_query_groups=2),
    "1 query group": _kind(num_query_groups=1),
    "latent attention": _kind(**MLA),
    "latent attention, direct q": _kind(**{**MLA, "q_lora_rank": None}),
    "sparse absorbed attention": _kind(layers=2, **DSA),
    "latent attention, joint down projection": _kind(
        **MLA, mla_down_proj_fusion=True, qk_layernorm=True
    ),
    "multi-token prediction": _kind(
        layers=2, mtp_num_layers=1, lora={"targets": ("all", "eh_proj")}
    ),
    "2 predicted tokens more": _kind(
        layers=2, mtp_num_layers=2, lora={"targets": ("all", "eh_proj")}
    ),
    "experts": _kind(**MOE, lora=WITH_ROUTER),
    "balanced experts": _kind(**{**MOE, **BALANCED}, lora=WITH_ROUTER),
    "experts in 4 layers": _kind(layers=4, **MOE),
    "ungated experts": _kind(**MOE, **UNGATED, lora={"expert_rank": 3}),
    "shared-outer experts": _kind(**MOE, lora={"expert_mode": "shared_outer"}),
    "shared experts": _kind(**MOE, **SHARED_EXPERTS),
    "GLM-4.5's layers": _kind(
        layers=2,
        moe_layer_freq=[0, 1],
        **{**MOE, **SHARED_EXPERTS, **CHOSEN_BY_SIGMOID, **GLM},
        lora=WITH_ROUTER,
    ),
    "gpt-oss's layers": _kind(layers=2, **GPT_OSS, lora=WITH_ROUTER),
    "gated delta nets": _kind(layers=2, **DELTA_NET),
    "gated delta nets, gates too": _kind(
        layers=1, **{**DELTA_NET, "linear_attention_freq": [1]}, lora={"delta_gates": True}
    ),
    "hybrid of delta nets and experts": Kind({"pattern": "GE|*G", **DELTA, **MOE}, WITH_ROUTER),
    "hybrid": _hybrid("M*|-M"),
    "hybrid with experts": _hybrid("ME*", **MOE, lora=WITH_ROUTER),
    "hybrid, z and x": _hybrid("M*", lora={"targets": ("tinker",)}),
    "hybrid in 4 stages": _hybrid("M|*|-|M"),
    "hybrid, multi-token prediction": _hybrid(
        "M|*/M-", mtp_num_layers=1, lora={"targets": ("all", "eh_proj")}
    ),
}

CP2, PP2, DP2 = Layout(cp=2), Layout(pp=2), Layout(dp=2)
TP2, TP2_SP = Layout(tp=2), Layout(tp=2, sp=True)
TP4, TP4_SP = Layout(tp=4), Layout(tp=4, sp=True)
TP2_DP2 = Layout(tp=2, sp=True, dp=2)
EP2 = Layout(dp=2, ep=2)
ETP2 = Layout(tp=2, sp=True, etp=2)
TP2_EP2 = Layout(tp=2, sp=True, ep=2)
EP2_ETP2 = Layout(tp=2, sp=True, dp=2, ep=2, etp=2)
OVERLAPPED = {
    "note": "distributed optimizer",
    "run": Run(distributed_optimizer=True, overlap=True),
}
RECOMPUTED = {
    "note": "full recompute",
    "fields": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _selective(*modules: str) -> dict[str, Any]:
    fields = {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    return {"note": f"recompute of {' and '.join(modules)}", "fields": fields}


def _with(note: str, **fields: Any) -> dict[str, Any]:
    return {"note": note, "fields": fields}


# Half precision rounds every activation: fp16 by an eighth of what bf16 does.
BF16 = _with("bf16", bf16=True)
FP16 = {**_with("fp16", fp16=True), "run": Run(loss_scale=2.0**13)}
FUSED = _with("fused accumulation", gradient_accumulation_fusion=True)
ALLGATHER = _with("allgather dispatcher", moe_token_dispatcher_type="allgather")
FUSED_ACTIVATION = _with("fused activation", bias_activation_fusion=True)
OVERLAPPED_SHARED = _with("overlapped", moe_shared_expert_overlap=True)


DENSE = [
    Case(layout=Layout()),
    Case(layout=Layout(), ops="reference", note="reference ops"),
    Case(layout=Layout(), **RECOMPUTED),
    Case(layout=Layout(), kind="latent attention"),
    *(
        Case(layout=layout, kind=kind)
        for layout in (TP2, TP2_SP)
        for kind in (
            "dense",
            "tied embeddings",
            "ungated with biases",
            "padded vocabulary",
            "shared A",
            "1 query group",
            "latent attention",
            "multi-token prediction",
        )
    ),
    Case(layout=TP2_SP, kind="latent attention, direct q"),
    # Megatron has it at TP 2 with sequence parallelism alone.
    *(Case(layout=layout, kind="sparse absorbed attention") for layout in (Layout(), TP2_SP, PP2)),
    Case(layout=CP2, kind="sparse absorbed attention", fields={"cp_comm_type": "allgather"}),
    *(Case(layout=o, kind="latent attention, joint down projection") for o in (TP2, TP2_SP)),
    Case(layout=TP2_SP, ops="reference", note="reference ops"),
    Case(layout=TP2_SP, **RECOMPUTED),
    Case(layout=TP2_SP, **_selective("core_attn", "mlp")),
    Case(layout=TP2_SP, **FUSED),
    Case(layout=TP2, kind="latent attention", **FUSED),
    Case(layout=TP2_SP, **BF16),
    *(Case(layout=layout, **FP16) for layout in (TP2_SP, PP2, CP2)),
    Case(layout=Layout(pp=2)),
    Case(layout=Layout(pp=2), **RECOMPUTED),
    Case(layout=Layout(pp=2), kind="tied embeddings"),
    Case(layout=Layout(pp=2), kind="multi-token prediction"),
    Case(layout=Layout(pp=2, vpp=2), kind="dense of 4 layers"),
    Case(layout=Layout(cp=2)),
    Case(layout=Layout(cp=2), kind="latent attention"),
    Case(layout=Layout(dp=2)),
    Case(layout=Layout(dp=2), **OVERLAPPED),
    Case(layout=TP4),
    Case(layout=TP4_SP),
    Case(layout=TP4, kind="2 query groups"),
    Case(layout=TP4_SP, kind="2 query groups"),
    Case(layout=TP4_SP, kind="latent attention"),
    Case(layout=TP2_DP2, **OVERLAPPED),
    Case(layout=TP2_DP2, **{**OVERLAPPED, **BF16}),
    Case(layout=TP2_DP2, **{**OVERLAPPED, **FUSED}),
    Case(layout=Layout(tp=2, sp=True, pp=2), kind="tied embeddings"),
    Case(layout=Layout(tp=2, sp=True, cp=2)),
]
EXPERTS = [
    Case(layout=Layout(), kind="experts"),
    Case(layout=Layout(), kind="experts", **_selective("moe")),
    Case(layout=Layout(), kind="shared-outer experts"),
    Case(layout=Layout(dp=2), kind="shared-outer experts"),
    *(
        Case(layout=layout, kind=kind)
        for layout in (EP2, ETP2, TP2_EP2)
        for kind in ("experts", "shared-outer experts", "shared experts")
    ),
    *(
        Case(layout=layout, kind="GLM-4.5's layers")
        for layout in (Layout(), EP2, ETP2, TP2_EP2, PP2, CP2)
    ),
    *(
        Case(layout=layout, kind="gpt-oss's layers")
        for layout in (Layout(), TP2_SP, EP2, ETP2, TP2_EP2, PP2, CP2)
    ),
    Case(layout=EP2, kind="gpt-oss's layers", **FUSED_ACTIVATION),
    Case(layout=TP2_SP, kind="experts"),
    Case(layout=ETP2, kind="ungated experts"),
    Case(layout=Layout(pp=2, vpp=2), kind="experts in 4 layers"),
    Case(layout=Layout(cp=2), kind="experts"),
    Case(layout=EP2, kind="experts", **ALLGATHER),
    Case(layout=ETP2, kind="experts", **ALLGATHER),
    Case(layout=EP2, kind="experts", **OVERLAPPED),
    Case(layout=EP2, kind="shared-outer experts", **OVERLAPPED),
    Case(layout=EP2, kind="shared experts", **OVERLAPPED_SHARED),
    Case(layout=TP2_EP2, kind="shared experts", **OVERLAPPED_SHARED),
    Case(layout=TP2_EP2, kind="experts", **_selective("moe")),
    Case(layout=EP2, kind="shared-outer experts", **FUSED),
    Case(layout=TP2_EP2, kind="experts", **FUSED),
    Case(layout=TP2_EP2, kind="experts", **FP16),
    Case(layout=Layout(dp=4, ep=4), kind="experts"),
    Case(layout=Layout(dp=4, ep=2), kind="shared-outer experts"),
    Case(layout=EP2_ETP2, kind="experts"),
    Case(layout=EP2_ETP2, kind="shared-outer experts"),
    Case(layout=EP2_ETP2, kind="experts", **OVERLAPPED),
    Case(layout=EP2_ETP2, kind="shared-outer experts", **OVERLAPPED),
    Case(layout=Layout(tp=2, sp=True, dp=2, ep=4), kind="experts"),
    Case(layout=Layout(tp=4, sp=True, ep=2, etp=2), kind="experts"),
    Case(layout=Layout(pp=2, dp=2, vpp=2, ep=2), kind="experts in 4 layers"),
]
HYBRID = [
    Case(layout=Layout(), kind="hybrid"),
    Case(layout=TP2, kind="hybrid"),
    Case(layout=TP2_SP, kind="hybrid"),
    Case(layout=TP2_SP, kind="hybrid", **RECOMPUTED),
    Case(layout=TP2_SP, kind="hybrid, multi-token prediction"),
    Case(layout=Layout(pp=2), kind="hybrid, multi-token prediction"),
    Case(layout=Layout(pp=2), kind="hybrid"),
    Case(layout=Layout(pp=2, vpp=2), kind="hybrid in 4 stages"),
    Case(layout=Layout(cp=2), kind="hybrid"),
    Case(layout=Layout(dp=2), kind="hybrid", **OVERLAPPED),
    Case(layout=EP2, kind="hybrid with experts"),
    Case(layout=TP2_EP2, kind="hybrid with experts"),
    Case(layout=Layout(), kind="hybrid, z and x"),
    Case(layout=TP2_SP, kind="hybrid, z and x"),
]


DELTA_NETS = [
    *(Case(layout=o, kind="gated delta nets") for o in (Layout(), TP2_SP, PP2, CP2)),
    Case(layout=TP2, kind="gated delta nets", ops="reference", note="reference ops"),
    Case(layout=TP2_SP, kind="gated delta nets", **RECOMPUTED),
    Case(layout=TP2_SP, kind="gated delta nets", **FUSED),
    Case(layout=DP2, kind="gated delta nets", **OVERLAPPED),
    Case(layout=TP2, kind="gated delta nets, gates too"),
    Case(layout=TP2_EP2, kind="hybrid of delta nets and experts"),
]


def _answers(layout: Layout, kind: str, answers: Answers) -> Case:
    return Case(layout=layout, kind=kind, note=str(answers), run=Run(answers=answers))


BY_TOKEN, BY_MICROBATCH = Answers(per_token=True), Answers()
ANSWERS = [
    *(
        _answers(layout, kind, answers)
        for answers in (BY_TOKEN, BY_MICROBATCH)
        for layout, kind in (
            (CP2, "dense"),
            (DP2, "dense"),
            (CP2, "sliding window"),
            (CP2, "2 predicted tokens more"),
            (PP2, "2 predicted tokens more"),
            (CP2, "balanced experts"),
            (EP2, "balanced experts"),
            (TP2_SP, "balanced experts"),
        )
    ),
    _answers(Layout(cp=2, dp=2), "2 predicted tokens more", BY_TOKEN),
    _answers(Layout(tp=2, sp=True, cp=2), "balanced experts", BY_MICROBATCH),
    *(
        _answers(CP2, kind, Answers(per_token=per_token, attention="mask", micro_batch_size=2))
        for kind, per_token in (("dense", True), ("dense", False), ("sliding window", False))
    ),
    _answers(TP2_SP, "2 predicted tokens more", BY_MICROBATCH),
    _answers(Layout(pp=2, vpp=2), "dense of 4 layers", BY_MICROBATCH),
    _answers(TP2, "fused cross entropy", BY_MICROBATCH),
]
CASES = [*DENSE, *EXPERTS, *HYBRID, *DELTA_NETS, *ANSWERS]
