"""The models of bench_model.py: what they are made of, and how Megatron builds them."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megalora import cpu


@dataclass(frozen=True)
class Size:
    """What a model is made of, and the tokens of its microbatch; no experts means dense."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_size: int
    seq_length: int
    vocab_size: int = 4096
    num_experts: int = 0
    top_k: int = 4
    expert_ffn_hidden_size: int = 0
    micro_batch_size: int = 1

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a step, which has one microbatch."""
        return self.micro_batch_size * self.seq_length

    @property
    def num_weights(self) -> int:
        """Return how many weights the matrices have; norms and routers are left out."""
        heads = 2 * (self.num_heads + self.num_query_groups) * self.head_size
        ffn = self.num_experts * self.expert_ffn_hidden_size or self.ffn_hidden_size
        layer = self.hidden_size * (heads + 3 * ffn)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size


# Layers of Llama-3.1-8B, experts of a middle size, layers of Qwen3-30B-A3B.
SIZES = {
    "dense": Size(4096, 14336, 8, 32, 8, 128, 4096),
    "moe": Size(4096, 14336, 4, 32, 8, 128, 4096, 4096, 16, 4, 2048),
    "qwen3-30b-a3b": Size(2048, 6144, 8, 32, 4, 128, 4096, 151936, 128, 8, 768),
}
SMALL = {
    "dense": Size(512, 1536, 4, 8, 2, 64, 256),
    "moe": Size(512, 1536, 4, 8, 2, 64, 256, 4096, 16, 4, 256),
    "qwen3-30b-a3b": Size(128, 384, 2, 4, 2, 32, 64, 4096, 128, 8, 48),
}
TOY = {
    "dense": Size(64, 96, 2, 4, 2, 16, 16, 256),
    "moe": Size(64, 96, 2, 4, 2, 16, 16, 256, 4, 2, 32),
    "qwen3-30b-a3b": Size(64, 96, 2, 4, 2, 16, 16, 256, 32, 8, 32),
}


def build(size: Size, device: str) -> GPTModel:
    """Build a model as Megatron does: in bf16 on a GPU, in fp32 on a CPU."""
    config = TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_attention_heads=size.num_heads,
        num_query_groups=size.num_query_groups,
        kv_channels=size.head_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        qk_layernorm=size.num_experts > 16,
        add_bias_linear=False,
        params_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        bf16=device == "cuda",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Megatron's default; without apex megalora.mends turns it off.
        gradient_accumulation_fusion=True,
        masked_softmax_fusion=False,
        **(_moe_fields(size) if size.num_experts else {}),
    )
    model = GPTModel(
        config,
        _layer_spec(config),
        vocab_size=size.vocab_size,
        max_sequence_length=size.seq_length,
        position_embedding_type="rope",
    )
    model.to(device)
    if has_te() and not config.gradient_accumulation_fusion:
        _fuse_gradient_accumulation(model)
    return model


def has_te() -> bool:
    """Say whether TransformerEngine's layers can run here."""
    return te.HAVE_TE and not cpu.installed()


def _moe_fields(size: Size) -> dict[str, Any]:
    """Return what a TransformerConfig needs to know about experts."""
    return {
        "num_moe_experts": size.num_experts,
        "moe_router_topk": size.top_k,
        "moe_ffn_hidden_size": size.expert_ffn_hidden_size,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": has_te(),
        "moe_permute_fusion": has_te(),
    }


def _layer_spec(config: TransformerConfig) -> Any:
    """Return TransformerEngine's layers, or Megatron's own with torch's fused attention."""
    if has_te():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    from megalora.mends.attention import CoreAttention

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return block


def _fuse_gradient_accumulation(model: GPTModel) -> None:
    """Let backward add to main_grad wherever TransformerEngine can: not in the output layer.

    That layer is Megatron's own and needs apex, without which Megatron fuses nowhere.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        if isinstance(getattr(module, "config", None), TransformerConfig):
            module.config.gradient_accumulation_fusion = True  # type: ignore[union-attr]
