"""Mistral, and Mixtral, of which only the sizes are known."""

from megalora.model.family import Experts, Family, Rate

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
        names=None,
        experts=Experts(size="intermediate_size"),
    ),
)
