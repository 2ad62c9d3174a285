"""A gradient that Megatron loses in multi-latent attention."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megalora.replace import Patch, around

QueryAndKeyValue = tuple[torch.Tensor, torch.Tensor]


def down_project(
    project: Callable[[MLASelfAttention, torch.Tensor], QueryAndKeyValue],
    self: MLASelfAttention,
    hidden_states: torch.Tensor,
) -> QueryAndKeyValue:
    """Sum the gradient of the shared rotary key over tensor-parallel ranks.

    Every rank's heads use it, but where the down projection is column parallel, as only the local
    layers have it, Megatron gathers it by an operation whose dgrad keeps each rank's own part.
    """
    query, key_value = project(self, hidden_states)
    sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
    if key_value.size(-1) == sum(sizes):
        return query, key_value
    key_value = mappings.gather_from_tensor_model_parallel_region(key_value)
    if self.config.sequence_parallel:
        # The caller gathers the rotary part over the sequence; dgrad: reduce-scatter.
        return query, mappings.scatter_to_sequence_parallel_region(key_value)
    latent, rotary = key_value.split(sizes, dim=-1)
    # dgrad: all-reduce
    rotary = mappings.copy_to_tensor_model_parallel_region(rotary)
    return query, torch.cat([latent, rotary], dim=-1)


PATCHES = (
    Patch(
        MLASelfAttention,
        "_qkv_down_projection",
        ("hidden_states",),
        around(down_project),
        "the gradient of the shared rotary key is lost over tensor-parallel ranks",
    ),
)
