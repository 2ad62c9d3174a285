"""gpt-oss 20b and 120b."""

from megalora.model.decoder_names import DECODER
from megalora.model.family import LLAMA_LIKE, Experts, Family, Names, Rate

MODULES = {
    **DECODER,
    "self_attention.core_attention.softmax_offset": ("self_attn.sinks",),
    "mlp.router": ("mlp.router",),
}
OTHERS = {"swiglu": False, "quick_geglu": True, "add_bias_linear": True, "glu_linear_offset": 1.0}

FAMILIES = (
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        rate=Rate("gpt-oss"),
        names=Names(modules=MODULES, interleaved=True),
        # TransformerEngine's experts with biases refuse the fusion that is a default of flags.
        megatron={**LLAMA_LIKE, **OTHERS, "bias_dropout_fusion": False},
        qkv_bias=True,
        rope_scalings=("yarn",),
        window_field="sliding_window",
        window_in_some=True,
        softmax_offsets=True,
        bias=True,
        clamp_field="swiglu_limit",
        experts=Experts(
            count=("num_local_experts", "num_experts"),
            size="intermediate_size",
            in_all_layers=True,
            always_normalised=True,
        ),
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        # Megatron's gate is x sigmoid(1.702 x).
        refused={"attention_bias": True, "swiglu_alpha": 1.702},
    ),
)
