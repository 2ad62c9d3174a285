"""Qwen2, Qwen2.5 and Qwen3, dense and with experts; of Qwen2-MoE only the sizes are known."""

from megalora.model.family import Experts, Family, Rate

RATE = Rate("qwen", 0.0775)

FAMILIES = (
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        rate=RATE,
        qkv_bias=True,
        vllm_unembedding=False,
        refused={"use_sliding_window": False},
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        rate=RATE,
        names=None,
        qkv_bias=True,
        qkv_bias_field="qkv_bias",
        experts=Experts(shared_size="shared_expert_intermediate_size"),
        vllm_unembedding=False,
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        rate=RATE,
        qk_norm=True,
        qkv_bias_field="attention_bias",
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        rate=RATE,
        qk_norm=True,
        qkv_bias_field="attention_bias",
        experts=Experts(),
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
)
