"""What the commands know of a model of which Megatron is not running."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.joined import split_joined
from megalora.hf.linears import Linear, locate
from megalora.hf.misfits import why_not_in_model
from megalora.hf.run_flags import Place, targets_of
from megalora.hf.stacked_experts import is_one
from megalora.model.shape import ModelShape
from megalora.targets import ModelFacts


def prepare() -> None:
    """Make megatron importable, on the CPU where there is no GPU, for `megalora.hf.one_process`."""
    # The commands that need no Megatron would wait seconds for what these import.
    from megalora import cpu, mends

    if cpu.wanted([]):
        cpu.install()
    mends.install()


def checkpoint_shape(
    tensors: Mapping[str, Tensor], facts: ModelFacts, stored: Mapping[str, Any]
) -> ModelShape:
    """Return the sizes of a model of which only a checkpoint of its adapters is known.

    stored: what is known of it besides, as `checkpoint.description.read_sizes` returns it. Without
    its num_layers, layers without an adapter after the last one that has one are not counted.
    """
    layers = [int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")]
    read_it = ("linear_qkv", "linear_fc1", "in_proj", "output_layer")
    wide = tuple(f"{name}_lora.lora_A" for name in read_it)
    hidden = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(wide)]
    narrow = ("linear_proj_lora.lora_B", "linear_fc2_lora.lora_B", "out_proj_lora.lora_B")
    hidden += [tensor.shape[-2] for name, tensor in tensors.items() if name.endswith(narrow)]
    if not hidden and "hidden_size" not in stored:
        raise ValueError("checkpoint has no adapters that Hugging Face's models have")
    return ModelShape.from_mapping(
        {
            **asdict(facts),
            "num_layers": max(layers, default=0) + 1,
            "hidden_size": next(iter(hidden), None),
            **stored,
        }
    )


def infer_config(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> LoRAConfig:
    """Return the smallest configuration that holds these factors.

    Its targets select the linears that have factors, and no others. Alpha is that of the largest
    dense module; scales that differ from it are folded into B. Experts that share what
    `shared_outer` shares make it that.
    """
    experts: dict[tuple[str, Linear, str], list[LoRAFactors]] = defaultdict(list)
    dense: list[LoRAFactors] = []
    places: set[Place] = set()
    delta_gates = False
    for name, module in split_joined(factors, shape).items():
        place = locate(name, shape)
        if place is None:
            raise ValueError(
                f"adapter has {name}, which the base does not have: "
                f"{why_not_in_model([name], shape)}"
            )
        layer, linear, _, projection = place
        delta_gates |= linear.is_delta_gate(projection)
        places.add((layer, linear))
        group = experts[linear.name(layer), linear, projection] if linear.is_expert else dense
        group.append(module.trimmed())
    of_experts = [module for group in experts.values() for module in group]
    rank = max((module.rank for module in dense), default=0)
    expert_rank = max((module.rank for module in of_experts), default=None)
    rank = rank or (expert_rank or 1) * shape.moe_router_topk
    largest = max(dense or of_experts, key=lambda module: module.rank)
    alpha = largest.scale * (largest.rank if not dense else rank)
    alpha = round(alpha) if same_scale(alpha, round(alpha)) else alpha
    return LoRAConfig(
        rank=rank,
        expert_rank=expert_rank,
        expert_mode="shared_outer" if _share_outer(experts, shape) else "per_expert",
        alpha=alpha,
        delta_gates=delta_gates,
        targets=targets_of(places, shape),
    )


def _share_outer(
    experts: Mapping[tuple[str, Linear, str], list[LoRAFactors]], shape: ModelShape
) -> bool:
    """Say whether all experts of a layer have one A of what they read, one B of what they write."""
    if not experts or shape.num_moe_experts == 1:
        return False
    for (_, linear, _), modules in experts.items():
        first = modules[0]
        one = first.lora_A if linear.is_fc1 else first.lora_B
        others = (m.lora_A if linear.is_fc1 else m.lora_B for m in modules)
        if len(modules) != shape.num_moe_experts or not all(is_one(one, o) for o in others):
            return False
        if not all(same_scale(first.scale, module.scale) for module in modules):
            return False
    return True
