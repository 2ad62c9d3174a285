"""Models that tests of sizes and recommendations share."""

from typing import Any

from megalora.config import LoRAConfig
from megalora.model.presets import preset_shape
from megalora.model.shape import ModelShape
from megalora.recommend import adapter_parameters

LLAMA = preset_shape("llama-3.1-8b")
MOE = preset_shape("qwen3-30b-a3b")
TINY_LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 80,
    "tie_word_embeddings": False,
}
TINY_MOE = {
    **TINY_LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [0],
}
TINY_QWEN2_MOE = {
    **TINY_MOE,
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 40,
}
TINY_GLM = {
    **TINY_LLAMA,
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
}

MEGATRON_LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
}

# The parsed arguments of a training run.
RUN = {
    **MEGATRON_LLAMA,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 2,
    "use_distributed_optimizer": True,
    "world_size": 16,
    "global_batch_size": 32,
    "train_iters": 50,
}


def lora(rank: int = 8, **fields: Any) -> LoRAConfig:
    return LoRAConfig(rank=rank, **fields)


def trainable(shape: ModelShape, config: LoRAConfig) -> int:
    return sum(adapter_parameters(shape, config).values())
