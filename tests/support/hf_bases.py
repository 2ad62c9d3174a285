"""What transformers makes of a directory, whatever its form."""

from pathlib import Path

import torch
from torch import Tensor

from tests.support.hf_models import IDS, logits, transformers

# A rope_scaling.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def own_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a tied model an unembedding of its own."""
    table = tensors["model.embed_tokens.weight"]
    return {**tensors, "lm_head.weight": table.flip(0) * 0.7 + 0.01}


def loaded(directory: Path) -> torch.nn.Module:
    """Return what transformers loads of a directory, in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager"
    )
    config = model.config
    config.tie_word_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # NOTE: as in hf_models.hf_model_from, rotary buffers are right in a model made anew only.
    fresh = transformers.AutoModelForCausalLM.from_config(config).float()
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def loaded_logits(directory: Path) -> Tensor:
    """Return the logits of what transformers loads of a directory."""
    return logits(loaded(directory), IDS)
