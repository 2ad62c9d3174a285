"""Hugging Face's names of a decoder layer's modules, by Megatron's, which families share."""

from collections.abc import Mapping

# What files of a multimodal model have for `model.` in the names of its language model.
LANGUAGE = "model.language_model."
# Of a decoder layer as transformers writes it: Llama's names, and those that others added.
DECODER: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
    "mlp.router": ("mlp.gate",),
    "mlp.experts.linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
    "mlp.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
    "mlp.shared_experts.linear_fc1": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
    # Of a layer behind the decoder's that predicts one token more.
    "enorm": ("enorm",),
    "hnorm": ("hnorm",),
    "eh_proj": ("eh_proj",),
    "final_layernorm": ("shared_head.norm",),
}
# Only a layer that predicts one token more has it.
PREDICTING = ".eh_proj.weight"
# transformers 5 may store all experts of a layer in one tensor [E, rows, columns].
STACKED: Mapping[str, str] = {
    "mlp.experts.gate_up_proj": "mlp.experts.linear_fc1",
    "mlp.experts.down_proj": "mlp.experts.linear_fc2",
}


# The other way to attend: keys and values, and perhaps queries, pass through a few numbers, their
# latent (DeepSeek-V2). A model has either the fused down projection or the two that it fuses.
LATENT_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "self_attention.linear_q_proj": ("self_attn.q_proj",),
    "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
    "self_attention.q_layernorm": ("self_attn.q_a_layernorm",),
    "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
    "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
    "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "self_attention.linear_qkv_down_proj": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
}
_HEADS = tuple(f"self_attention.{name}" for name in ("linear_qkv", "q_layernorm", "k_layernorm"))
LATENT_DECODER: Mapping[str, tuple[str, ...]] = {
    **{module: names for module, names in DECODER.items() if module not in _HEADS},
    **LATENT_ATTENTION,
}
# Gated delta nets, in the layers that attend by them (Qwen3-Next).
DELTA_NET: Mapping[str, tuple[str, ...]] = {
    "self_attention.conv1d": ("linear_attn.conv1d",),
    "self_attention.A_log": ("linear_attn.A_log",),
    "self_attention.dt_bias": ("linear_attn.dt_bias",),
    "self_attention.out_norm": ("linear_attn.norm",),
    "self_attention.out_proj": ("linear_attn.out_proj",),
}
