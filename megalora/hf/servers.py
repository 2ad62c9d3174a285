"""What servers refuse of an adapter that PEFT takes, known by sizes and names alone."""

from collections.abc import Mapping

from megalora.hf.factors import LoRAFactors
from megalora.model.family import DEFAULT_NAMES, Family

# Of vLLM 0.33: the largest --max-lora-rank, and the rows of a vocabulary with LoRA.
_MAX_RANK = 512
_MAX_VOCABULARY = 258_048


def refusals(
    factors: Mapping[str, LoRAFactors], vocab_size: int, family: Family | None
) -> list[str]:
    """Return a sentence for each thing that vLLM would refuse, and what to leave out.

    family: None where it is not known.
    """
    found = []
    largest = max(module.rank for module in factors.values())
    if largest > _MAX_RANK:
        found.append(f"vLLM takes no rank above {_MAX_RANK}, this adapter has {largest}")
    names = (family and family.names) or DEFAULT_NAMES
    if names.unembedding not in factors:
        return found
    if family is not None and not family.vllm_unembedding:
        found.append(
            f"vLLM takes no adapter of {family.architecture}'s {names.unembedding}: leave the "
            "unembedding out, as by --lora-targets attn mlp, where vLLM is to serve this adapter"
        )
    if vocab_size > _MAX_VOCABULARY:
        found.append(
            f"vLLM takes adapters of {names.unembedding} up to {_MAX_VOCABULARY} rows, this "
            f"one has {vocab_size}: leave the unembedding out, as by --lora-targets attn mlp"
        )
    return found
