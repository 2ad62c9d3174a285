"""What a frozen base needs beside the switch of its parameters."""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule

from megalora.adapters.adapter import named_adapters
from megalora.targets import ADAPTER_SUFFIX


def freeze_router_bias(chunk: MegatronModule) -> None:
    """Keep the expert bias of a frozen router, which Megatron moves at every step."""
    if getattr(chunk.config, "moe_router_enable_expert_bias", False):
        chunk.config.moe_router_bias_update_rate = 0.0


def make_embedding_require_grad(chunk: MegatronModule) -> None:
    """Let the layers see an input that requires gradient, as behind a trained embedding.

    A frozen embedding's output requires none. Megatron runs layers in pieces that it differentiates
    by themselves (recomputation, the schedule plan of --overlap-moe-expert-parallel-comm): those
    then drop the gradients of everything inside, mostly without an error.
    """
    unembedding = "output_layer" + ADAPTER_SUFFIX
    has_adapters = any(not name.startswith(unembedding) for name, _ in named_adapters([chunk]))
    # The schedule plan runs backward through every layer, adapted or not.
    if not has_adapters and not chunk.config.overlap_moe_expert_parallel_comm:
        return
    for module in chunk.modules():
        if isinstance(module, LanguageModelEmbedding):
            module.register_forward_hook(_require_grad)


def _require_grad(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
