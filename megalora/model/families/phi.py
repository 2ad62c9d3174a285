"""Phi-3 and Phi-4, whose rotary embeddings are plain."""

from megalora.model.decoder_names import DECODER
from megalora.model.family import Family, Names, Rate

JOINED = {
    **DECODER,
    "self_attention.linear_qkv": ("self_attn.qkv_proj",),
    "mlp.linear_fc1": ("mlp.gate_up_proj",),
}

FAMILIES = (
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        rate=Rate("phi"),
        names=Names(
            modules=JOINED,
            joined={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
        ),
        window_field="sliding_window",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
)
