"""Hybrid models of Megatron's own layers, where --transformer-impl local asks for these.

Megatron's default layers of a hybrid model are TransformerEngine's, whatever is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import TERowParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megalora.mends.delta_net import STORED_NORMS
from megalora.replace import Patch, around

_ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda", "sharded_state_dict_keys_map")
_MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda", "sharded_state_dict_keys_map")


def build(
    original: Callable[..., None],
    self: HybridModel,
    config: TransformerConfig,
    hybrid_stack_spec: ModuleSpec,
    *args: object,
    **kwargs: object,
) -> None:
    """Build a hybrid model of local layers, where these are asked for and not given."""
    if config.transformer_impl == "local" and _is_of_transformer_engine(hybrid_stack_spec):
        layers = cast(HybridStackSubmodules, hybrid_stack_spec.submodules)
        hybrid_stack_spec = replace(hybrid_stack_spec, submodules=_local(layers, config))
    original(self, config, hybrid_stack_spec, *args, **kwargs)


def _is_of_transformer_engine(stack: ModuleSpec) -> bool:
    layers = cast(HybridStackSubmodules, stack.submodules)
    attention = getattr(_submodules(layers.attention_layer), "self_attention", None)
    return getattr(_submodules(attention), "linear_proj", None) is TERowParallelLinear


def _submodules(spec: object) -> Any:
    return getattr(spec, "submodules", None)


def _local(layers: HybridStackSubmodules, config: TransformerConfig) -> HybridStackSubmodules:
    """Return the stack with the halves of GPT models' local layers, which compute and store alike.

    Sparse attention stays TransformerEngine's.
    """
    latent = config.multi_latent_attention
    attention = _half(_ATTENTION, config, latent=latent)
    return replace(
        layers,
        mamba_layer=_local_mamba(layers.mamba_layer),
        gdn_layer=_local_delta_net(layers.gdn_layer),
        **{"mla_layer" if latent else "attention_layer": _with(layers.attention_layer, attention)},
        mlp_layer=_with(layers.mlp_layer, _half(_MLP, config, latent=latent)),
        moe_layer=_with(layers.moe_layer, _half(_MLP, config, latent=latent, num_experts=1)),
        mtp_block_spec=_local_mtp(layers.mtp_block_spec),
    )


def _half(
    fields: tuple[str, ...],
    config: TransformerConfig,
    *,
    latent: bool,
    num_experts: int | None = None,
) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(
        num_experts=num_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return TransformerLayerSubmodules(**{name: getattr(layer, name) for name in fields})


def _with(spec: object, submodules: object) -> ModuleSpec:
    return replace(cast(ModuleSpec, spec), submodules=submodules)


def _local_mamba(spec: object) -> ModuleSpec:
    layer = _submodules(spec)
    linears = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    mixer = _with(layer.mixer, replace(_submodules(layer.mixer), **linears))
    return _with(spec, replace(layer, norm=WrappedTorchNorm, mixer=mixer))


def _local_delta_net(spec: object) -> ModuleSpec:
    layer = _submodules(spec)
    own: dict[str, object] = {
        "in_proj": ColumnParallelLinear,
        "out_norm": WrappedTorchNorm,
        "out_proj": RowParallelLinear,
    }
    attention = _with(layer.self_attention, replace(_submodules(layer.self_attention), **own))
    norm = {
        "input_layernorm": WrappedTorchNorm,
        "sharded_state_dict_keys_map": STORED_NORMS["in_proj"],
    }
    return _with(spec, replace(layer, self_attention=attention, **norm))


def _local_mtp(block: ModuleSpec | None) -> ModuleSpec | None:
    if block is None:
        return None
    (layer,) = _submodules(block).layer_specs
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), WrappedTorchNorm)
    own = replace(_submodules(layer), **norms, eh_proj=ColumnParallelLinear)
    return _with(block, MultiTokenPredictionBlockSubmodules(layer_specs=[_with(layer, own)]))


def final_norm(
    original: Callable[..., torch.nn.Module],
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
) -> torch.nn.Module:
    """Build the norm after a hybrid model's layers, of the same kind as these."""
    if config.transformer_impl == "local":
        return cast(torch.nn.Module, WrappedTorchNorm(config, hidden_size, eps))
    return original(config=config, hidden_size=hidden_size, eps=eps)


PATCHES = (
    Patch(
        HybridModel,
        "__init__",
        ("config", "hybrid_stack_spec"),
        around(build),
        "its default layers are TransformerEngine's, also where --transformer-impl is local",
    ),
    Patch(
        hybrid_block,
        "TENorm",
        None,
        around(final_norm),
        "the norm after all layers is TransformerEngine's, whatever these are",
    ),
)
