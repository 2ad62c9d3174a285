"""GLM-5's layers of Megatron's own linears; its spec of them takes TransformerEngine's."""

import copy
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_dsa_module_spec_for_backend,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor


class Duplicated(torch.nn.Linear):
    """Called as a TELinear whose weight every tensor-parallel rank has whole."""

    def __init__(self, in_features: int, out_features: int, *, config: Any, **_how: Any) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=config.params_dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class _Backend(LocalSpecProvider):
    def linear(self) -> type:
        return ColumnParallelLinear


def sparse_block(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return this stage's layers, each with absorbed latent attention to what its indexer picks."""
    plain = copy.copy(config)
    plain.experimental_attention_variant = None
    block = get_gpt_decoder_block_spec(plain, use_transformer_engine=False, vp_stage=vp_stage)
    attention: Any = get_dsa_module_spec_for_backend(config, _Backend())
    indexer = attention.submodules.core_attention.submodules.indexer.submodules
    indexer.linear_wq_b = indexer.linear_wk = indexer.linear_weights_proj = Duplicated
    for layer in block.layer_specs or ():
        layer.submodules.self_attention = attention  # type: ignore[union-attr]
    return block
