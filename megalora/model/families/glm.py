"""GLM-4.5, GLM-4.6 and GLM-4.7, which are one kind of model."""

from megalora.model.family import Experts, Family, Rate

FAMILIES = (
    Family(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        rate=Rate("glm"),
        qkv_bias_field="attention_bias",
        qk_norm_field="use_qk_norm",
        partial_rotary=True,
        prediction_field="num_nextn_predict_layers",
        experts=Experts(
            count=("n_routed_experts", "num_local_experts"),
            shared_count="n_shared_experts",
            dense_first="first_k_dense_replace",
            sigmoid=True,
        ),
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
)
