"""What the commands know of a model of which Megatron is not running."""

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from megalora import cpu, mends
from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.linears import locate
from megalora.model.shape import ModelShape
from megalora.targets import ModelFacts


def prepare() -> None:
    """Make megatron importable, on the CPU where there is no GPU, for `megalora.hf.one_process`."""
    if cpu.wanted([]):
        cpu.install()
    mends.install()


def checkpoint_shape(
    tensors: Mapping[str, Tensor], facts: ModelFacts, *, vocab_size: int
) -> ModelShape:
    """Return the sizes of a model of which only its adapters are known.

    Layers without an adapter after the last one that has one are not counted.
    """
    layers = [int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")]
    wide = ("linear_qkv_lora.lora_A", "linear_fc1_lora.lora_A", "output_layer_lora.lora_A")
    hidden = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(wide)]
    narrow = ("linear_proj_lora.lora_B", "linear_fc2_lora.lora_B")
    hidden += [tensor.shape[-2] for name, tensor in tensors.items() if name.endswith(narrow)]
    if not hidden:
        raise ValueError("checkpoint has no adapters that Hugging Face's models have")
    return ModelShape.from_mapping(
        {
            **asdict(facts),
            "num_layers": max(layers, default=0) + 1,
            "hidden_size": hidden[0],
            "vocab_size": vocab_size,
        }
    )


def infer_config(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> LoRAConfig:
    """Return the smallest configuration that holds these factors.

    Alpha is that of the largest dense module; scales that differ from it are folded into B.
    """
    experts: list[LoRAFactors] = []
    dense: list[LoRAFactors] = []
    targets: set[str] = set()
    for name, module in factors.items():
        place = locate(name, shape)
        if place is None:
            raise ValueError(f"adapter has {name}, which the base does not have")
        (experts if place[1].is_expert else dense).append(module.trimmed())
        targets.add(place[1].megatron)
    rank = max((module.rank for module in dense), default=0)
    expert_rank = max((module.rank for module in experts), default=None)
    rank = rank or (expert_rank or 1) * shape.moe_router_topk
    largest = max(dense or experts, key=lambda module: module.rank)
    alpha = largest.scale * (largest.rank if not dense else rank)
    alpha = round(alpha) if same_scale(alpha, round(alpha)) else alpha
    return LoRAConfig(
        rank=rank, expert_rank=expert_rank, alpha=alpha, targets=tuple(sorted(targets))
    )
