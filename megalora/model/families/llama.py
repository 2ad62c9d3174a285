"""Llama 2 and 3."""

from megalora.model.family import Family, Rate

FAMILIES = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        rate=Rate("llama", 0.781),
        qkv_bias_field="attention_bias",
        rope_scalings=("llama3", "yarn"),
        refused={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
)
