"""The modules of TransformerEngine that Megatron imports, made of what stands for them."""

import importlib.metadata
import sys
from types import ModuleType

from megalora.plan.engine import (
    attention,
    base,
    grouped,
    linear,
    norms,
    optimizers,
    rope,
    routing,
    state,
)

# Whose behaviour the layers have.
_KNOWN = "2.20.2"
_PYTORCH = "transformer_engine.pytorch"
# By module, what Megatron imports of it. What is missing here, Megatron takes for absent.
_MEMBERS: dict[str, dict[str, object]] = {
    "transformer_engine": {},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": {"DelayedScaling": state.DelayedScaling},
    _PYTORCH: {
        "DotProductAttention": attention.DotProductAttention,
        "GroupedLinear": grouped.GroupedLinear,
        "LayerNorm": norms.LayerNorm,
        "LayerNormLinear": linear.LayerNormLinear,
        "Linear": linear.Linear,
        "RMSNorm": norms.RMSNorm,
        "autocast": state.in_bf16,
        "fp8_autocast": state.in_bf16,
        "fp8_model_init": state.in_bf16,
        "quantized_model_init": state.in_bf16,
    },
    f"{_PYTORCH}.attention": {"DotProductAttention": attention.DotProductAttention},
    f"{_PYTORCH}.attention.rope": {
        "apply_fused_qkv_rotary_pos_emb": rope.apply_fused_qkv_rotary_pos_emb,
        "apply_rotary_pos_emb": rope.apply_rotary_pos_emb,
    },
    f"{_PYTORCH}.distributed": {
        "CudaRNGStatesTracker": state.CudaRNGStatesTracker,
        "activation_recompute_forward": state.in_bf16,
        "checkpoint": state.checkpoint,
    },
    f"{_PYTORCH}.fp8": {
        "FP8GlobalStateManager": state.FP8GlobalStateManager,
        "fp8_autocast": state.in_bf16,
        "fp8_model_init": state.in_bf16,
    },
    f"{_PYTORCH}.module": {},
    f"{_PYTORCH}.module.base": {
        "TransformerEngineBaseModule": base.TransformerEngineBaseModule,
        "get_dummy_wgrad": base.get_dummy_wgrad,
    },
    f"{_PYTORCH}.optimizers": {
        name: getattr(optimizers, name)
        for name in (
            *("FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm"),
            *("multi_tensor_scale", "multi_tensor_scale_tensor", "multi_tensor_unscale_l2norm"),
        )
    },
    f"{_PYTORCH}.permutation": {
        name: getattr(routing, name)
        for name in (
            *("moe_permute", "moe_permute_with_probs", "moe_unpermute"),
            *("moe_sort_chunks_by_index", "moe_sort_chunks_by_index_with_probs"),
        )
    },
    f"{_PYTORCH}.tensor": {"QuantizedTensor": state.QuantizedTensor},
    f"{_PYTORCH}.router": {
        name: getattr(routing, name)
        for name in (
            *("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"),
            "fused_topk_with_score_function",
        )
    },
}


def install() -> None:
    """Let Megatron, not imported yet, find these layers where it looks for TransformerEngine.

    Also where that is installed: its own look for a GPU.
    """
    made: dict[str, ModuleType] = {}
    for name, members in _MEMBERS.items():
        module = ModuleType(name, __doc__)
        # A package: parts of it can be imported.
        module.__path__ = []
        vars(module).update(members)
        made[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
    vars(made["transformer_engine"])["__version__"] = _version()
    sys.modules.update(made)


def _version() -> str:
    """Return the version that is installed, or the one that the layers were made after."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return _KNOWN
