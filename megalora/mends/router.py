"""The count of tokens for an expert bias, which Megatron's routers take without padding only."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


def install() -> None:
    """Let routers with an expert bias leave padding out of their counts.

    Megatron combines its routing map [tokens, experts] with a padding mask [tokens], which has no
    dimension for the experts.
    """
    count = TopKRouter._apply_expert_bias

    def apply_expert_bias(
        self: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        count(self, routing_map)

    patched: Any = TopKRouter
    patched._apply_expert_bias = apply_expert_bias
