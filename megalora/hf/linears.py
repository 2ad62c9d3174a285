"""Which Hugging Face projections each Megatron linear fuses, and both sides' names for them."""

import re
from dataclasses import dataclass

from megalora.config import LoRAConfig
from megalora.hf.shape import ModelShape

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Linear:
    """A Megatron linear and the Hugging Face projections that it fuses, in their order."""

    megatron: str
    prefix: str
    projections: tuple[str, ...]
    is_expert: bool = False

    @property
    def is_qkv(self) -> bool:
        """Say whether rows are interleaved per query group."""
        return self.megatron.endswith("linear_qkv")

    def name(self, layer: int | None) -> str:
        """Return the global Megatron name in a layer."""
        return self.megatron if layer is None else f"decoder.layers.{layer}.{self.megatron}"

    def rank(self, config: LoRAConfig, shape: ModelShape) -> int:
        """Return the rank of one projection's adapter."""
        return config.resolve_expert_rank(shape.moe_router_topk) if self.is_expert else config.rank


EXPERTS_FC1 = Linear("mlp.experts.linear_fc1", "mlp.experts", ("gate_proj", "up_proj"), True)
EXPERTS_FC2 = Linear("mlp.experts.linear_fc2", "mlp.experts", ("down_proj",), True)
LAYER_LINEARS = (
    Linear("self_attention.linear_qkv", "self_attn", ("q_proj", "k_proj", "v_proj")),
    Linear("self_attention.linear_proj", "self_attn", ("o_proj",)),
    Linear("mlp.linear_fc1", "mlp", ("gate_proj", "up_proj")),
    Linear("mlp.linear_fc2", "mlp", ("down_proj",)),
    Linear("mlp.shared_experts.linear_fc1", "mlp.shared_expert", ("gate_proj", "up_proj")),
    Linear("mlp.shared_experts.linear_fc2", "mlp.shared_expert", ("down_proj",)),
    EXPERTS_FC1,
    EXPERTS_FC2,
)
OUTPUT_LAYER = Linear("output_layer", "", ("lm_head",))


def find_linear(name: str) -> tuple[str, Linear]:
    """Return the Hugging Face prefix and the linear of a global Megatron module name.

    Raises ValueError for a module that Hugging Face adapters cannot name.
    """
    if name == OUTPUT_LAYER.megatron:
        return "", OUTPUT_LAYER
    found = _LAYER.fullmatch(name)
    for linear in LAYER_LINEARS:
        if found and found.group(2) == linear.megatron:
            return f"model.layers.{found.group(1)}.{linear.prefix}.", linear
    raise ValueError(
        f"{name} has no adapter in Hugging Face's models: train with --lora-targets that leave "
        "it out, or merge the adapter into its base"
    )


def locate(name: str, shape: ModelShape) -> tuple[int | None, Linear, int, str] | None:
    """Return (layer, linear, expert, projection) of a Hugging Face name, None where none is."""
    if name in OUTPUT_LAYER.projections:
        return None, OUTPUT_LAYER, 0, name
    found = _HF_LAYER.fullmatch(name)
    if not found or int(found.group(1)) >= shape.num_layers:
        return None
    layer, rest = int(found.group(1)), found.group(2)
    expert = _HF_EXPERT.fullmatch(rest)
    if expert:
        if int(expert.group(1)) >= shape.num_moe_experts:
            return None
        is_fc2 = expert.group(2) in EXPERTS_FC2.projections
        linear = EXPERTS_FC2 if is_fc2 else EXPERTS_FC1
        return layer, linear, int(expert.group(1)), expert.group(2)
    prefix, _, projection = rest.rpartition(".")
    for linear in LAYER_LINEARS:
        if linear.prefix == prefix and projection in linear.projections and not linear.is_expert:
            return layer, linear, 0, projection
    return None
