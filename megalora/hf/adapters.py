"""Adapters between Megatron's names and rows and Hugging Face's, on full tensors.

A Megatron adapter's lora_A [P r, in] stacks the P projections of its fused linear; the rows of
lora_B [out, r] are in Megatron's order, interleaved per query group for linear_qkv, [gate; up] for
linear_fc1. Experts have a leading dimension E, which a factor shared over experts lacks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters_in import from_hf
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.fused import split_qkv
from megalora.hf.joined import join_parts
from megalora.hf.linears import Linear, find_linear
from megalora.hf.wide_parts import join_wide
from megalora.model.facts import delta_parts
from megalora.model.families import FAMILIES
from megalora.model.shape import ModelShape

__all__ = ["from_hf", "to_hf"]

_ENDS = ("_lora.lora_A", "_lora.lora_B")


def to_hf(
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    initial: Mapping[str, Tensor] | None = None,
    by_values: bool = True,
) -> dict[str, LoRAFactors]:
    """Turn full adapter tensors by global Megatron name into factors by Hugging Face name.

    tensors: `decoder.layers.3.self_attention.linear_qkv_lora.lora_A` and the like, unsharded.
    initial: start values of a `pissa` adapter, whose base lost them: the update is then the
        difference, of rank 2 r.
    by_values: parts that a module joins have one A where their values are the same, so that the
        rank depends on these; see `megalora.hf.joined`.
    Raises ValueError for a module that has no Hugging Face adapter, and for sizes that do not fit.
    """
    if config.init == "pissa" and initial is None:
        raise ValueError(
            "adapter starts from `pissa`, which took its start values from the base: give them as "
            "`initial`, or merge the adapter into its base"
        )
    factors = join_parts(_to_hf(tensors, config, shape), shape, by_values=by_values)
    if config.init == "pissa" and initial is not None:
        start = join_parts(_to_hf(initial, config, shape), shape, by_values=by_values)
        factors = {name: _difference(module, start[name]) for name, module in factors.items()}
    return factors


def _to_hf(
    tensors: Mapping[str, Tensor], config: LoRAConfig, shape: ModelShape
) -> dict[str, LoRAFactors]:
    factors: dict[str, LoRAFactors] = {}
    for name, (a, b) in _pairs(tensors).items():
        layer, linear = find_linear(name, shape)
        linear = linear.adapted(config, layer)
        rank = linear.rank(config, shape)
        _check_sizes(name, a, b, linear, config, rank)
        scale = config.scale(rank)
        if linear.is_expert:
            for expert in range(_num_experts(name, a, b, shape)):
                one_a = a[expert] if a.dim() == 3 else a
                one_b = b[expert] if b.dim() == 3 else b
                hf_names = linear.hf_names(layer, expert)
                factors |= _split(hf_names, one_a, one_b, linear, rank, scale, shape)
        else:
            factors |= _split(linear.hf_names(layer), a, b, linear, rank, scale, shape)
    return join_wide(factors, shape)


def _difference(module: LoRAFactors, start: LoRAFactors) -> LoRAFactors:
    return LoRAFactors(
        torch.cat([module.lora_A, start.lora_A]),
        torch.cat([module.lora_B, -start.lora_B], dim=1),
        module.scale,
    )


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    unknown = [name for name in tensors if not name.endswith(_ENDS)]
    if unknown:
        raise ValueError(f"{summarise(unknown)}: adapter tensors end in {' or '.join(_ENDS)}")
    names = list(dict.fromkeys(name[: -len(_ENDS[0])] for name in tensors))
    alone = [name for name in names if any(name + end not in tensors for end in _ENDS)]
    if alone:
        raise ValueError(f"adapter has one of lora_A and lora_B of {summarise(alone)}")
    return {name: (tensors[name + _ENDS[0]], tensors[name + _ENDS[1]]) for name in names}


def _check_sizes(
    name: str, a: Tensor, b: Tensor, linear: Linear, config: LoRAConfig, rank: int
) -> None:
    stacked = 1 if config.shared_a else len(linear.projections)
    if a.shape[-2] != stacked * rank or b.shape[-1] != rank:
        raise ValueError(
            f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of {stacked} "
            f"projections of rank {rank}: the LoRA configuration belongs to another adapter"
        )


def _num_experts(name: str, a: Tensor, b: Tensor, shape: ModelShape) -> int:
    sizes = {tensor.shape[0] for tensor in (a, b) if tensor.dim() == 3}
    if sizes != {shape.num_moe_experts}:
        raise ValueError(
            f"{name} has {sorted(sizes)} experts, the model has {shape.num_moe_experts}"
        )
    return shape.num_moe_experts


def _split(
    hf_names: list[str],
    a: Tensor,
    b: Tensor,
    linear: Linear,
    rank: int,
    scale: float,
    shape: ModelShape,
) -> dict[str, LoRAFactors]:
    count = len(hf_names)
    if linear.is_qkv:
        family = FAMILIES.get(shape.model_type)
        if shape.attention_output_gate and not (family and family.output_gate):
            raise ValueError(
                f"{hf_names[0]}: attention_output_gate is set, and this family has no gates among "
                "its queries: keep the adapter as --save's checkpoint, or write W + c B A by "
                "--save-merged"
            )
        if b.shape[0] != shape.qkv_rows:
            raise ValueError(
                f"{hf_names[0]}: lora_B of linear_qkv has {b.shape[0]} rows, the model has "
                f"{shape.qkv_rows}"
            )
        rows = split_qkv(b, shape)
    elif linear.is_unembedding:
        rows = [_trim_vocabulary(b, shape)]
    elif linear.is_joint_down:
        rows = list(b.split(shape.latent_rows))
    elif linear.is_of_delta_net:
        rows = list(b.split(list(delta_parts(shape).values())[:count]))
    else:
        rows = list(b.chunk(count))
    factors_a = list(a.chunk(count)) if a.shape[0] == count * rank else [a] * count
    return {
        name: LoRAFactors(one_a, one_b, scale)
        for name, one_a, one_b in zip(hf_names, factors_a, rows, strict=True)
    }


def _trim_vocabulary(b: Tensor, shape: ModelShape) -> Tensor:
    if not 0 < shape.vocab_size <= b.shape[0]:
        raise ValueError(
            f"output_layer has {b.shape[0]} rows and vocab_size is {shape.vocab_size}: give the "
            "vocabulary size of the Hugging Face model"
        )
    return b[: shape.vocab_size]
