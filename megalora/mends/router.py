"""The count of tokens for an expert bias, which Megatron's routers take without padding only."""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megalora.replace import Patch, around


def apply_expert_bias(
    count: Callable[[TopKRouter, torch.Tensor], None],
    self: TopKRouter,
    routing_map: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
) -> None:
    """Leave padding out of the counts of routers with an expert bias.

    Megatron combines its routing map [tokens, experts] with a padding mask [tokens], which has no
    dimension for the experts.
    """
    if padding_mask is not None:
        routing_map = routing_map & ~padding_mask[:, None]
    count(self, routing_map)


PATCHES = (
    Patch(
        TopKRouter,
        "_apply_expert_bias",
        ("routing_map", "padding_mask"),
        around(apply_expert_bias),
        "a padding mask is combined with the routing map without a dimension for experts",
    ),
)
