"""A spec of hybrid models of Megatron's own layers; those of the default are TransformerEngine's.

Import it after `tests.support.mamba_on_cpu.install()`.
Scripts name it by `--spec tests.support.hybrid_spec STACK`.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)


class LocalStack(HybridStack):
    """A HybridStack with torch's norm at its end, where Megatron takes TransformerEngine's."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = _norm(config, config.hidden_size, config.layernorm_epsilon)


def _norm(config: Any, hidden_size: int, eps: float) -> Any:
    return WrappedTorchNorm(config, hidden_size, eps)


def _attention() -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(normalization="RMSNorm")
    return TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )


def _mlp(num_experts: int | None) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
    return TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda
    )


_MAMBA = MambaLayerSubmodules(
    norm=WrappedTorchNorm,
    mixer=ModuleSpec(
        module=MambaMixer,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    ),
    mamba_bda=get_bias_dropout_add,
)
_MTP_LAYER = MultiTokenPredictionLayerSubmodules(
    enorm=WrappedTorchNorm,
    hnorm=WrappedTorchNorm,
    eh_proj=ColumnParallelLinear,
    # Built of the pattern after the slash.
    mtp_model_layer=None,  # type: ignore[arg-type]
    layer_norm=WrappedTorchNorm,
)
STACK = ModuleSpec(
    module=LocalStack,
    submodules=HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=_MAMBA),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention()),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp(None)),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=_mlp(1)),
        mtp_block_spec=ModuleSpec(
            module=MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=_MTP_LAYER)]
            ),
        ),
    ),
)
