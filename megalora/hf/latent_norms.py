"""Norms of latents, in which transformers differs from all other norms of a model."""

import torch

from megalora.hf.rotary import latent_attentions

# transformers' norms of latents have this one, whatever config.json says of the others.
EPSILON = 1e-6
# Each norm is a module, or in TransformerEngine's linear that reads it.
_PLACES = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")


def set_latent_norms(chunk: torch.nn.Module) -> None:
    """Set the epsilon of the norms of latents."""
    for attention in latent_attentions(chunk):
        for place in _PLACES:
            norm = getattr(attention, place, None)
            if norm is not None and hasattr(norm, "eps"):
                norm.eps = EPSILON
