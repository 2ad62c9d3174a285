"""Qwen2, Qwen2.5 and Qwen3, dense and with experts."""

from megalora.model.decoder_names import DECODER
from megalora.model.family import Experts, Family, Names, Rate

RATE = Rate("qwen", 0.0775)
SCALINGS = ("llama3", "yarn")
ONE_SHARED = {
    **DECODER,
    "mlp.shared_experts.linear_fc1": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_expert.down_proj",),
    "mlp.shared_experts.gate": ("mlp.shared_expert_gate",),
}

FAMILIES = (
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        rate=RATE,
        rope_scalings=SCALINGS,
        qkv_bias=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        refused={"use_sliding_window": False},
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        rate=RATE,
        rope_scalings=SCALINGS,
        names=Names(modules=ONE_SHARED, experts_by_parameters=True),
        qkv_bias=True,
        qkv_bias_field="qkv_bias",
        experts=Experts(shared_size="shared_expert_intermediate_size", shared_gate=True),
        defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768},
        refused={"use_sliding_window": False},
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        rate=RATE,
        rope_scalings=SCALINGS,
        qk_norm=True,
        qkv_bias_field="attention_bias",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        },
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        rate=RATE,
        rope_scalings=SCALINGS,
        qk_norm=True,
        qkv_bias_field="attention_bias",
        experts=Experts(),
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768},
        refused={"attention_bias": False, "use_sliding_window": False},
    ),
)
