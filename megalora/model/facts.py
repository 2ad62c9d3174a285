"""The sizes of a model that decide the form of its adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalora.model.shape import DELTA_SIZES, MAMBA_SIZES, ModelShape

# Of a gated delta net's in_proj: the parts that are one number for each head of values.
DELTA_GATES = ("beta", "alpha")
# Of Mamba-2's in_proj: the parts that Thinking Machines' service adapts, each with an A of its own.
MAMBA_WIDE = ("z", "x")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The sizes of a model that decide the form of its adapters.

    moe_layer_freq: 0 or 1 for each layer, or 1 for experts in all of them.
    linear_attention_freq: 0 or 1 for each layer, or 0 without a gated delta net, whose sizes are
        the other ones so named.
    hybrid_layer_pattern: kinds of a HybridModel's layers, without pipeline stages; empty for GPT.
        mamba_*: sizes of its layers of Mamba-2, which older checkpoints do not have.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    attention_output_gate: bool = False
    moe_router_topk: int = 1
    num_moe_experts: int = 0
    moe_layer_freq: int | Sequence[int] = 1
    q_lora_rank: int = 0
    linear_attention_freq: int | Sequence[int] = 0
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    hybrid_layer_pattern: str = ""
    mamba_num_heads: int = field(default=0, compare=False)
    mamba_head_dim: int = field(default=0, compare=False)
    mamba_num_groups: int = field(default=0, compare=False)
    mamba_state_dim: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        # One form of each model: facts of a checkpoint are compared with those of a run, and
        # Megatron's defaults for experts are not those of a config.json that has none.
        frequency = self.moe_layer_freq
        if not self.num_moe_experts:
            object.__setattr__(self, "moe_router_topk", 1)
        if not self.num_moe_experts or (not isinstance(frequency, int) and all(frequency)):
            object.__setattr__(self, "moe_layer_freq", 1)


def facts_of(shape: ModelShape) -> ModelFacts:
    """Return what a model's sizes say of its adapters."""
    return ModelFacts(
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        gated_linear_unit=shape.gated_linear_unit,
        attention_output_gate=shape.attention_output_gate,
        moe_router_topk=shape.moe_router_topk,
        num_moe_experts=shape.num_moe_experts,
        moe_layer_freq=shape.moe_layer_freq,
        q_lora_rank=shape.q_lora_rank,
        linear_attention_freq=shape.delta_net_pattern if any(shape.delta_net_pattern) else 0,
        hybrid_layer_pattern=shape.hybrid_layer_pattern,
        **{name: getattr(shape, name) for name in (*DELTA_SIZES, *MAMBA_SIZES)},
    )


def part_rows(shape: ModelShape) -> dict[str, int]:
    """Return how many rows each part has of modules that join some, by `Names.joined`'s names."""
    kv, ffn = shape.num_query_groups * shape.kv_channels, shape.ffn_hidden_size
    dense = {"q": shape.query_size, "k": kv, "v": kv, "gate": ffn, "up": ffn}
    return {**delta_parts(shape), **dense}


def delta_parts(sizes: ModelFacts | ModelShape) -> dict[str, int]:
    """Return the parts of a gated delta net's in_proj in their order, and how many rows each has.

    Named as Megatron's checkpoints name them.
    """
    keys = sizes.linear_num_key_heads * sizes.linear_key_head_dim
    values = sizes.linear_num_value_heads * sizes.linear_value_head_dim
    wide = {"query": keys, "key": keys, "value": values, "z": values}
    return wide | dict.fromkeys(DELTA_GATES, sizes.linear_num_value_heads)


def mamba_parts(sizes: ModelFacts | ModelShape) -> dict[str, int]:
    """Return the parts of Mamba-2's in_proj in their order, and how many rows each has.

    Named as Megatron's checkpoints name them.
    """
    inner = sizes.mamba_num_heads * sizes.mamba_head_dim
    state = sizes.mamba_num_groups * sizes.mamba_state_dim
    wide = dict.fromkeys(MAMBA_WIDE, inner)
    return {**wide, "B": state, "C": state, "dt": sizes.mamba_num_heads}
