"""The bias by which routers choose experts: its count of tokens, and its precision."""

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


def keep_precision(
    apply: Callable[..., TopKRouter],
    self: TopKRouter,
    fn: Callable[[torch.Tensor], torch.Tensor],
    recurse: bool = True,
) -> TopKRouter:
    """Keep the expert bias in fp32 where a module is converted to another precision.

    Float16Module rounds the bias of a loaded model, and Megatron only makes fp32 of what is left:
    a rounded bias chooses other experts.
    """
    bias: torch.Tensor | None = self.expert_bias
    apply(self, fn, recurse)
    if bias is not None and self.expert_bias.dtype != bias.dtype:
        self.expert_bias = bias.to(self.expert_bias.device)
    return self


PATCHES = (
    Patch(
        TopKRouter,
        "_apply",
        ("fn", "recurse"),
        around(keep_precision),
        "the expert bias of a loaded model is rounded to the precision of its weights",
    ),
    Patch(
        TopKRouter,
        "_apply_expert_bias",
        ("routing_map", "padding_mask"),
        around(apply_expert_bias),
        "a padding mask is combined with the routing map without a dimension for experts",
    ),
)
