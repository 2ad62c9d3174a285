"""The rotary embedding of a Megatron model as config.json has it: not all of it has flags."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch

from megalora.model.rope import Rope, Yarn, rope

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention


# config.json's name of a number of YaRN -> that of Megatron's embedding.
_YARN_FIELDS = {
    **{name: name for name in asdict(Yarn())},
    "factor": "scaling_factor",
    "truncate": "correction_range_round_to_int",
}


def set_rotary(chunk: "GPTModel", config: Mapping[str, Any]) -> None:
    """Set the frequencies of a model chunk, of all its layers or of each, from config.json."""
    wanted = rope(config)
    embedding = getattr(chunk, "rotary_pos_emb", None)
    if embedding is not None:
        _set_frequencies(embedding, wanted)
        # What `hf_config` writes.
        chunk.rotary_base = wanted.theta
    for attention in latent_attentions(chunk):
        if wanted.yarn:
            _set_yarn(attention, wanted.theta, wanted.yarn)
        else:
            _set_frequencies(attention.rotary_pos_emb, wanted)


def set_rotary_of_flags(chunk: torch.nn.Module, args: argparse.Namespace) -> None:
    """Set the scaled frequencies that flags ask for, which Megatron's builders do not all pass on.

    Those of GPT models drop --rope-scaling-factor, those of HybridModels --use-rope-scaling too.
    """
    embedding = getattr(chunk, "rotary_pos_emb", None)
    if args.use_rope_scaling and embedding is not None:
        _set_frequencies(embedding, Rope(float(args.rotary_base), float(args.rope_scaling_factor)))


def rope_theta(chunk: "GPTModel") -> float:
    """Return the base of a chunk's frequencies; ValueError where these are scaled as Llama 3's."""
    if chunk.config.multi_latent_attention:
        return float(cast("MLATransformerConfig", chunk.config).rotary_base)
    if hasattr(chunk, "rotary_scaling"):
        theta, is_scaled = chunk.rotary_base, chunk.rotary_scaling
    else:
        # A HybridModel has the frequencies alone: theta ** -steps, in fp32.
        logs = chunk.rotary_pos_emb.inv_freq.double().log()
        steps = torch.arange(len(logs), dtype=torch.float64) / len(logs)
        theta = round(math.exp(-logs.dot(steps) / steps.dot(steps)))
        is_scaled = not torch.allclose(logs, -math.log(theta) * steps, rtol=0, atol=1e-5)
    if is_scaled:
        raise ValueError("the model has rope scaling: give save_hf_base its original config.json")
    return float(theta)


def latent_attentions(chunk: torch.nn.Module) -> "list[MultiLatentAttention]":
    """Return the attention through latents of each layer, which has an embedding of its own."""
    found = [
        m for m in chunk.modules() if hasattr(m, "rotary_pos_emb") and hasattr(m, "kv_layernorm")
    ]
    return cast("list[MultiLatentAttention]", found)


def yarn_of(chunk: "GPTModel") -> Yarn | None:
    """Return the numbers of a chunk's embeddings, None where they are not scaled so."""
    found: Any = getattr(chunk, "rotary_pos_emb", None)
    for attention in latent_attentions(chunk):
        found = attention.rotary_pos_emb
    if not hasattr(found, "scaling_factor"):
        return None
    numbers = {field: getattr(found, name) for field, name in _YARN_FIELDS.items()}
    return Yarn(**numbers)


def _set_frequencies(embedding: "RotaryEmbedding", wanted: Rope) -> None:
    frequencies = embedding.inv_freq
    exponents = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (
        2 * len(frequencies)
    )
    fresh = 1.0 / wanted.theta**exponents
    if wanted.factor != 1.0:
        fresh = embedding._apply_scaling(fresh, factor=cast("int", wanted.factor))
    embedding.inv_freq = fresh.to(frequencies)
    if wanted.yarn:
        scaled = cast("YarnRotaryEmbedding", embedding)
        scaled.rotary_base = wanted.theta
        scaled.inv_freq_extra = fresh.to(frequencies)
        scaled.inv_freq_inter = (fresh / wanted.yarn.factor).to(frequencies)
    # The embedding of a length is cached over calls, with the frequencies that it was made of.
    type(embedding).forward.cache_clear()


def _set_yarn(attention: "MultiLatentAttention", theta: float, yarn: Yarn) -> None:
    """Make the embedding anew: what Megatron computes of its numbers is kept in several places."""
    own = cast("YarnRotaryEmbedding", attention.rotary_pos_emb)
    fields = {_YARN_FIELDS[name]: value for name, value in asdict(yarn).items()}
    attention.rotary_pos_emb = type(own)(
        attention.config.qk_pos_emb_head_dim,
        rotary_base=theta,
        cp_group=attention.pg_collection.cp,
        **fields,
    )
