"""Mistral and Mixtral."""

from megalora.model.decoder_names import DECODER
from megalora.model.family import Experts, Family, Names, Rate

EXPERTS = "block_sparse_moe.experts.{}."
MIXTRAL = {
    **DECODER,
    "mlp.router": ("block_sparse_moe.gate",),
    "mlp.experts.linear_fc1": (EXPERTS + "w1", EXPERTS + "w3"),
    "mlp.experts.linear_fc2": (EXPERTS + "w2",),
}

STACKED = {
    "block_sparse_moe.experts.gate_up_proj": "mlp.experts.linear_fc1",
    "block_sparse_moe.experts.down_proj": "mlp.experts.linear_fc2",
}
LOADED = {f"block_sparse_moe.{part}": f"mlp.{part}" for part in ("gate", "experts")}

FAMILIES = (
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        rate=Rate("mistral"),
        window_field="sliding_window",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        rate=Rate("mixtral"),
        names=Names(modules=MIXTRAL, stacked=STACKED, loaded_as=LOADED),
        window_field="sliding_window",
        experts=Experts(
            count=("num_local_experts", "num_experts"),
            size="intermediate_size",
            in_all_layers=True,
            always_normalised=True,
        ),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
        },
    ),
)
