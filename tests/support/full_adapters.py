"""Adapters of small models as Megatron's side hands them over: full tensors, no ranks."""

import torch
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.model.shape import ModelShape

DENSE = ModelShape(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=5,
    vocab_size=11,
    ffn_hidden_size=7,
)
MOE = ModelShape(
    num_layers=2,
    hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=11,
    num_moe_experts=12,
    moe_router_topk=2,
    moe_ffn_hidden_size=5,
    moe_shared_expert_intermediate_size=9,
)
PADDED = 16


def megatron_adapter(shape: ModelShape, config: LoRAConfig, *, shared_experts: bool = False):
    """Return random full adapter tensors as Megatron's side hands them over."""
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    h, r = shape.hidden_size, config.rank
    tensors: dict[str, Tensor] = {}

    def linear(name: str, count: int, num_in: int, num_out: int, rank: int = r) -> None:
        count = 1 if config.shared_a else count
        tensors[f"{name}_lora.lora_A"] = randn(count * rank, num_in)
        tensors[f"{name}_lora.lora_B"] = randn(num_out, rank)

    def mlp(name: str, ffn: int) -> None:
        linear(f"{name}.linear_fc1", 2, h, 2 * ffn)
        linear(f"{name}.linear_fc2", 1, ffn, h)

    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}"
        linear(f"{prefix}.self_attention.linear_qkv", 3, h, shape.qkv_rows)
        heads = shape.num_attention_heads * shape.kv_channels
        linear(f"{prefix}.self_attention.linear_proj", 1, heads, h)
        if not shape.num_moe_experts:
            mlp(f"{prefix}.mlp", shape.ffn_hidden_size)
            continue
        if shared_experts:
            mlp(f"{prefix}.mlp.shared_experts", 9)
        num, ffn = shape.num_moe_experts, shape.moe_ffn_hidden_size
        rank = config.resolve_expert_rank(shape.moe_router_topk)
        count = 1 if config.shared_a else 2
        outer = config.expert_mode == "shared_outer"
        fc1, fc2 = f"{prefix}.mlp.experts.linear_fc1_lora", f"{prefix}.mlp.experts.linear_fc2_lora"
        every = () if outer else (num,)
        tensors[f"{fc1}.lora_A"] = randn(*every, count * rank, h)
        tensors[f"{fc1}.lora_B"] = randn(num, 2 * ffn, rank)
        tensors[f"{fc2}.lora_A"] = randn(num, rank, ffn)
        tensors[f"{fc2}.lora_B"] = randn(*every, h, rank)
    linear("output_layer", 1, h, PADDED)
    tensors["output_layer_lora.lora_B"][shape.vocab_size :] = 0
    return tensors
