"""Mistral and Mixtral, of which only the sizes are known."""

from megalora.model.family import Experts, Family, Rate

FAMILIES = (
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        rate=Rate("mistral"),
        names=None,
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        rate=Rate("mixtral"),
        names=None,
        experts=Experts(size="intermediate_size"),
    ),
)
