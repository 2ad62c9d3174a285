"""DeepSeek-V3, R1 and V3.1, Moonlight, and Kimi-K2, which are one kind of model."""

from dataclasses import replace

from megalora.model.decoder_names import LATENT_DECODER
from megalora.model.family import SIGMOID_EXPERTS, Family, Names, Rate

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rate=Rate("deepseek"),
    names=Names(modules=LATENT_DECODER),
    qk_norm=True,
    latent=True,
    rope_scalings=("yarn",),
    prediction_field="num_nextn_predict_layers",
    experts=SIGMOID_EXPERTS,
    defaults={
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    # What says otherwise of a router is DeepSeek-V2's; transformers looks at none of the three.
    refused={
        "attention_bias": False,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
)

FAMILIES = (
    DEEPSEEK_V3,
    # With its own code beside the weights; its config.json names DeepSeek-V3's class.
    replace(DEEPSEEK_V3, model_type="kimi_k2", rate=Rate("kimi")),
)
