"""GLM-4.5, GLM-4.6 and GLM-4.7, which are one kind of model, and GLM-4.7-Flash."""

from dataclasses import replace

from megalora.model.decoder_names import LATENT_DECODER
from megalora.model.family import SIGMOID_EXPERTS, Family, Names, Rate

FAMILIES = (
    Family(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        rate=Rate("glm"),
        qkv_bias_field="attention_bias",
        qk_norm_field="use_qk_norm",
        partial_rotary=True,
        prediction_field="num_nextn_predict_layers",
        experts=SIGMOID_EXPERTS,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0,
        },
    ),
    Family(
        model_type="glm4_moe_lite",
        architecture="Glm4MoeLiteForCausalLM",
        rate=Rate("glm"),
        names=Names(modules=LATENT_DECODER),
        qk_norm=True,
        latent=True,
        prediction_field="num_nextn_predict_layers",
        experts=replace(SIGMOID_EXPERTS, kinds="mlp_layer_types"),
        defaults={
            "num_key_value_heads": 20,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.8,
        },
        refused={"attention_bias": False, "rope_interleave": True},
    ),
)
