"""A gradient that Megatron loses in multi-latent attention, and a norm that it adds there."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, mappings
from megatron.core.transformer.experimental_attention_variant.absorbed_mla import (
    AbsorbedMLASelfAttention,
)
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import (
    FusedMLASelfAttention,
    MLASelfAttention,
)

from megalora.replace import Patch, around

QueryAndKeyValue = tuple[torch.Tensor, torch.Tensor]
# By name: the classes of an attention's norms and projections.
Classes = dict[str, object]
Resolve = Callable[[QKNormConfigResolver], Classes]
Projected = tuple[torch.Tensor, torch.Tensor | None]


def down_project(
    project: Callable[[MLASelfAttention, torch.Tensor], QueryAndKeyValue],
    self: MLASelfAttention,
    hidden_states: torch.Tensor,
) -> QueryAndKeyValue:
    """Sum the gradient of the shared rotary key over tensor-parallel ranks.

    Every rank's heads use it, but where the down projection is column parallel, as the local layers
    and the joint one (`mla_down_proj_fusion`) have it, Megatron gathers it by an operation whose
    dgrad keeps each rank's own part.
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


def resolve_local(resolve: Resolve, self: QKNormConfigResolver) -> Classes:
    """Leave queries that pass through no latent without a norm of theirs, in the local layers."""
    return resolve_plain(resolve, self) if self.fused_norm_linear_impl is None else resolve(self)


def resolve_plain(resolve: Resolve, self: QKNormConfigResolver) -> Classes:
    """Leave queries that pass through no latent without a norm of theirs.

    The layer's own is before them; `qk_layernorm` is for the latent of keys and values then.
    """
    if self.has_q_lora or self.is_dsa or not self.config.qk_layernorm:
        return resolve(self)
    self.has_q_lora = True
    return {**resolve(self), "linear_q_proj": self.submodules.linear_q_proj or self.linear_impl}


def init_absorbed(
    init: Callable[..., None], self: AbsorbedMLASelfAttention, *args: object, **kwargs: object
) -> None:
    """Let the column-parallel down projection of absorbed attention give whole rows of its tokens.

    The attention requires sequence parallelism, and then gathers the rotary key over the sequence.
    """
    init(self, *args, **kwargs)
    down = self.linear_kv_down_proj
    if isinstance(down, ColumnParallelLinear) and self.config.tensor_model_parallel_size > 1:
        down.register_forward_hook(_whole_rows)


def _whole_rows(_module: object, _inputs: object, output: Projected) -> Projected:
    # dgrad: all-gather of the tokens, then this rank's columns
    key_value = mappings.gather_from_tensor_model_parallel_region(output[0])
    return mappings.scatter_to_sequence_parallel_region(key_value), output[1]


_LOST = "the gradient of the shared rotary key is lost over tensor-parallel ranks"
PATCHES = (
    *(
        Patch(kind, "_qkv_down_projection", ("hidden_states",), around(down_project), _LOST)
        for kind in (MLASelfAttention, FusedMLASelfAttention)
    ),
    Patch(
        AbsorbedMLASelfAttention,
        "__init__",
        ("config", "submodules"),
        around(init_absorbed),
        _LOST,
    ),
    Patch(
        QKNormConfigResolver,
        "resolve",
        ("self",),
        around(resolve_local),
        "a norm of the latent of keys and values asks for one more, of queries without a latent, "
        "which the local layers have not",
    ),
)
# Where the model is Hugging Face's, whose models have no such norm.
HUGGING_FACE = (
    Patch(
        QKNormConfigResolver,
        "resolve",
        ("self",),
        around(resolve_plain),
        "with `--hf-model`: TransformerEngine's layers norm twice what queries without a latent "
        "are projected from",
    ),
)
