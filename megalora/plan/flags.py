"""Flags that a plan plans otherwise than they say, and what of a plan is no graph that was run."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.cuda_graph_config import InferenceCudaGraphScope
from megatron.training import arguments

from megalora.plan.engine.attention import is_unfused
from megalora.replace import Patch, around

_NOTES = "megalora_plan_notes"


class _Without(NamedTuple):
    """A field of Megatron's arguments that a plan goes without, where it is set.

    fields: what it and those that need it are set to. note: what that leaves out.
    """

    name: str
    fields: dict[str, object]
    note: str


_WITHOUT = (
    _Without(
        "fp8",
        {
            "fp8": None,
            "fp8_param_gather": False,
            "first_last_layers_bf16": False,
            "reuse_grad_buf_for_mxfp8_param_ag": False,
        },
        "--fp8-format is planned in bf16: FP8 halves what trained linears keep of their inputs, "
        "and adds a copy of their weights",
    ),
    _Without(
        "fp4",
        {"fp4": None, "fp4_param_gather": False},
        "--fp4-format is planned in bf16: FP4 keeps less of inputs, and adds copies of weights",
    ),
    _Without(
        "tp_comm_overlap",
        {"tp_comm_overlap": False},
        "--tp-comm-overlap is planned without its buffers, which hold all tokens of a microbatch "
        "once for each kind of linear",
    ),
    _Without(
        "symmetric_ar_type",
        {"symmetric_ar_type": None},
        "--symmetric-ar-type is planned with NCCL's sums, without its buffers",
    ),
    _Without(
        "cpu_offloading",
        {"cpu_offloading": False, "cpu_offloading_num_layers": 0},
        "--cpu-offloading-num-layers is planned with everything on the GPU",
    ),
    _Without(
        "fine_grained_activation_offloading",
        {"fine_grained_activation_offloading": False, "offload_modules": []},
        "--fine-grained-activation-offloading is planned with everything on the GPU",
    ),
    _Without(
        "use_te_activation_func",
        {"use_te_activation_func": False},
        "--use-te-activation-func is planned with torch's functions, which keep more",
    ),
)


def simplify(args: argparse.Namespace) -> None:
    """Leave out of checked arguments what needs a GPU to be built; `notes` says what."""
    found = []
    for without in _WITHOUT:
        if getattr(args, without.name, None):
            vars(args).update(without.fields)
            found.append(without.note)
    if getattr(args, "cuda_graph_impl", "none") != "none":
        args.cuda_graph_impl, args.cuda_graph_modules = "none", []
        args.inference_cuda_graph_scope = InferenceCudaGraphScope.none
        found.append("--cuda-graph-impl is planned without graphs, which keep their own buffers")
    if args.moe_token_dispatcher_type == "flex":
        args.moe_token_dispatcher_type, args.moe_enable_deepep = "alltoall", False
        found.append(
            "--moe-token-dispatcher-type flex is planned as alltoall: other buffers, and "
            "tokens that are sent once for each expert instead of once for each rank"
        )
    setattr(args, _NOTES, found)


def notes(args: argparse.Namespace) -> list[str]:
    """Return in sentences what a plan's activations are made of, and what they leave out."""
    by_te = HAVE_TE and args.transformer_impl == "transformer_engine"
    layers = "TransformerEngine's layers" if by_te else "Megatron's local layers"
    attention = "all scores of attention" if by_te and is_unfused() else "flash attention"
    found = [
        f"activations: what a step of Megatron's own schedule holds, with {layers} and {attention} "
        "as shapes that keep and allocate what their kernels do",
        "not counted: the CUDA context, buffers of cuBLAS and NCCL, and what the allocator wastes",
    ]
    if args.num_experts:
        found.append("experts: each is taken to get as many tokens as any other")
    if _has_delta_nets(args):
        found.append(
            "gated delta nets: as torch computes them where fla is not installed, whose kernels "
            "hold less"
        )
    if args.gradient_accumulation_fusion:
        found.append(
            "gradients: added to main_grad by the kernel of apex; without it, a weight's gradient "
            "is held beside"
        )
    return [*found, *getattr(args, _NOTES, [])]


def _has_delta_nets(args: argparse.Namespace) -> bool:
    is_variant = args.experimental_attention_variant == "gated_delta_net"
    return is_variant or "G" in (args.hybrid_layer_pattern or "")


def _validated(
    validate: Callable[..., argparse.Namespace], args: argparse.Namespace, *more: object
) -> argparse.Namespace:
    result = validate(args, *more)
    simplify(args)
    return result


PATCHES = (
    Patch(
        arguments,
        "validate_args",
        ("args",),
        around(_validated),
        "what a plan goes without is checked as a run checks it",
    ),
)
