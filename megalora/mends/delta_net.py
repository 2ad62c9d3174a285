"""Gated delta nets without `fla`, and of Megatron's own linears and norms.

Megatron has the layer for the kernels of flash-linear-attention and TransformerEngine's linears
alone. On the CPU it is torch's also where `fla` is installed, whose kernels are for GPUs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt import experimental_attention_variant_module_specs as specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules, common, gdn
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megalora.mends import delta_rule
from megalora.replace import Patch, around, instead

# By the name of an attention's first linear: what a checkpoint calls the norm before it, which
# TransformerEngine fuses with that linear.
STORED_NORMS = {
    linear: {"input_layernorm.": f"self_attention.{linear}.layer_norm_"}
    for linear in ("in_proj", "linear_qkv")
}
_STORED_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}

Kernel = Callable[..., Any]
Computed = tuple[Tensor, Tensor | None]
Build = Callable[[TransformerConfig, BackendSpecProvider | None], Any]


def compute_rule(
    kernel: Kernel | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    **options: object,
) -> Computed:
    """Answer for fla's `chunk_gated_delta_rule`; [b, s, heads, d] everywhere."""
    if kernel is not None and query.is_cuda:
        return kernel(query, key, value, g=g, beta=beta, cu_seqlens=cu_seqlens, **options)
    # Megatron's layer has no state before its sequences, and wants none after them.
    assert not any(options.values()), options
    return delta_rule.gated_delta_rule(query, key, value, g, beta, cu_seqlens), None


def compute_convolution(
    kernel: Kernel | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: object,
) -> Computed:
    """Answer for fla's `causal_conv1d`; x: [b, s, d]."""
    if kernel is not None and x.is_cuda:
        return kernel(x=x, weight=weight, bias=bias, cu_seqlens=cu_seqlens, **options)
    # The layer asserts what it has of activations.
    assert options.pop("activation") in ("silu", "swish")
    assert not any(options.values()), options
    return delta_rule.causal_convolution(x, weight, bias, cu_seqlens), None


def compute_unit_length(kernel: Kernel | None, x: Tensor) -> Tensor:
    """Answer for fla's `l2norm`; x: [..., d]."""
    return kernel(x) if kernel is not None and x.is_cuda else delta_rule.unit_length(x)


def is_local(config: TransformerConfig) -> bool:
    """Say whether a model's delta nets are to be Megatron's own."""
    return (
        config.transformer_impl == "local"
        and config.experimental_attention_variant == "gated_delta_net"
    )


def provider(
    original: Callable[..., BackendSpecProvider], config: TransformerConfig
) -> BackendSpecProvider:
    """Give Megatron's own linears and norms where --transformer-impl local asks for them."""
    return LocalSpecProvider() if is_local(config) else original(config=config)


def delta_net(
    original: Build, config: TransformerConfig, backend: BackendSpecProvider | None = None
) -> ModuleSpec:
    """Describe a delta net, whose norm is the layer's where no linear has it."""
    spec = original(config, backend)
    if not is_local(config):
        return spec
    linears = replace(
        cast(GatedDeltaNetSubmodules, spec.submodules),
        in_proj=LocalSpecProvider().column_parallel_linear(),
    )
    return replace(spec, submodules=linears, metainfo={"fuse_input_layernorm": False})


def attention(
    original: Build, config: TransformerConfig, backend: BackendSpecProvider | None = None
) -> ModuleSpec:
    """Describe the attention of the layers between delta nets."""
    if not is_local(config):
        return original(config, backend)
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    own = cast(TransformerLayerSubmodules, layer.submodules).self_attention
    return replace(cast(ModuleSpec, own), metainfo={"fuse_input_layernorm": False})


def layers(
    original: Build, config: TransformerConfig, backend: BackendSpecProvider | None = None
) -> list[ModuleSpec]:
    """Describe all layers, whose norms a checkpoint names as TransformerEngine's layers do."""
    described = original(config, backend)
    if not is_local(config):
        return described
    has_experts = (
        specs.get_moe_layer_pattern(config) if config.num_moe_experts else [0] * config.num_layers
    )
    is_delta_net = specs.get_linear_attention_pattern(config)
    return [
        replace(
            layer,
            submodules=replace(
                cast(TransformerLayerSubmodules, layer.submodules),
                sharded_state_dict_keys_map={
                    **STORED_NORMS["in_proj" if delta else "linear_qkv"],
                    **({} if experts else _STORED_MLP_NORM),
                },
            ),
        )
        for layer, delta, experts in zip(described, is_delta_net, has_experts, strict=True)
    ]


_NO_FLA = "without `fla` (flash-linear-attention), and on the CPU, gated delta nets are torch's"
_NO_TE = (
    "gated delta nets are of TransformerEngine's layers, also where `--transformer-impl` is local"
)
PATCHES = (
    Patch(common, "HAVE_FLA", None, instead(True), _NO_FLA),
    Patch(common, "l2norm", None, around(compute_unit_length), _NO_FLA),
    Patch(gdn, "causal_conv1d", None, around(compute_convolution), _NO_FLA),
    Patch(gdn, "chunk_gated_delta_rule", None, around(compute_rule), _NO_FLA),
    Patch(specs, "_get_backend_spec_provider", ("config",), around(provider), _NO_TE),
    *(
        Patch(specs, name, ("config", "backend"), around(wrapper), _NO_TE)
        for name, wrapper in (
            ("get_gated_delta_net_module_spec", delta_net),
            ("_get_self_attention_module_spec", attention),
            ("get_transformer_layer_with_experimental_attention_variant_spec", layers),
        )
    ),
)
