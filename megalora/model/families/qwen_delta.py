"""Qwen3-Next, and Qwen3.5, 3.6 and 3.8: gated delta nets between layers of gated attention."""

from dataclasses import replace

from megalora.model.decoder_names import DECODER, DELTA_NET, LANGUAGE
from megalora.model.families.qwen import ONE_SHARED
from megalora.model.family import LLAMA_LIKE, Experts, Family, Names, Rate

GATED = {
    **LLAMA_LIKE,
    "attention_output_gate": True,
    "layernorm_zero_centered_gamma": True,
}
SIZES = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 32768,
}
REFUSED = {"attention_bias": False, "attn_output_gate": True, "use_sliding_window": False}
# What predicts one token more, which transformers leaves out.
PREDICTING = "mtp."

NEXT = {
    **ONE_SHARED,
    **DELTA_NET,
    "self_attention.in_proj": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
}
QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    rate=Rate("qwen3_next"),
    names=Names(
        modules=NEXT,
        joined={
            "linear_attn.in_proj_qkvz": ("query", "key", "value", "z"),
            "linear_attn.in_proj_ba": ("beta", "alpha"),
        },
        joined_by_head=True,
        beside=(PREDICTING,),
    ),
    megatron=GATED,
    qk_norm=True,
    partial_rotary=True,
    delta_net=True,
    experts=Experts(shared_size="shared_expert_intermediate_size", shared_gate=True),
    defaults={**SIZES, "norm_topk_prob": True, "shared_expert_intermediate_size": 512},
    refused=REFUSED,
)

_APART = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
DENSE = {**DECODER, **DELTA_NET, "self_attention.in_proj": _APART}
SPARSE = {**ONE_SHARED, **DELTA_NET, "self_attention.in_proj": _APART}
QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    rate=Rate("qwen3_5"),
    names=Names(
        modules=DENSE,
        joined={
            "linear_attn.in_proj_qkv": ("query", "key", "value"),
            "linear_attn.in_proj_z": ("z",),
            "linear_attn.in_proj_b": ("beta",),
            "linear_attn.in_proj_a": ("alpha",),
        },
        language=LANGUAGE,
        beside=(PREDICTING, "model.visual."),
    ),
    megatron=GATED,
    qk_norm=True,
    partial_rotary=True,
    delta_net=True,
    defaults={**SIZES, "num_key_value_heads": 4},
    refused=REFUSED,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    names=replace(QWEN3_5.names, modules=SPARSE),
    experts=Experts(
        shared_size="shared_expert_intermediate_size",
        shared_gate=True,
        in_all_layers=True,
        always_normalised=True,
    ),
    defaults={**SIZES, "shared_expert_intermediate_size": 512},
)


def _multimodal(text: Family, model_type: str, architecture: str) -> Family:
    """Return the row of a model of which `text` is the language model."""
    names = replace(text.names, adapted=text.names.language)
    return replace(
        text,
        model_type=model_type,
        architecture=architecture,
        names=names,
        text_type=text.model_type,
    )


FAMILIES = (
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    _multimodal(QWEN3_5, "qwen3_5", "Qwen3_5ForConditionalGeneration"),
    _multimodal(QWEN3_5_MOE, "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
)
