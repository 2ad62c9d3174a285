"""Tiny real GPT and hybrid models whose base weights are the same numbers on every layout."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_layer_allocation import get_hybrid_total_layer_count
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from tests.dist.support.layouts import Layout
from tests.support.sparse_spec import sparse_block

# Of hybrid models: Megatron's default layers, of its own linears.
STACK, HYBRID_LAYERS = hybrid_stack_spec, {"transformer_impl": "local"}
VOCAB_SIZE = 64
SEQ_LENGTH = 16

# 2 query heads per group; h, f and the head size differ, so that a transposed weight is noticed.
DENSE = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
# Mamba-2's parts z, x, B, C, dt have unequal sizes: 64, 64, 24, 24, 8 for two groups.
MAMBA = {"mamba_state_dim": 12, "mamba_head_dim": 8, "mamba_num_heads": 8, "mamba_num_groups": 2}
MLA = {
    "num_query_groups": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}
# As gpt-oss has them: half of the layers see a window, numbers beyond the clamp are usual.
YARN = {
    "yarn_rotary_scaling_factor": 8.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 1.0,
    "yarn_beta_slow": 0.1,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": False,
}
GPT_OSS = {
    **MOE,
    "yarn": YARN,
    "softmax_type": "learnable",
    "window_size": (3, 0),
    "window_attn_skip_freq": 2,
    "add_bias_linear": True,
    "activation_func": quick_gelu,
    "activation_func_clamp_value": 0.4,
    "glu_linear_offset": 1.0,
}
# Each token attends to 6 of the 16 at most.
DSA = {
    **MLA,
    "experimental_attention_variant": "dsa",
    "transformer_impl": "local",
    "qk_layernorm": True,
    "dsa_indexer_n_heads": 4,
    "dsa_indexer_head_dim": 12,
    "dsa_indexer_topk": 6,
    # The Hadamard transform turns queries and keys alike, and is a CUDA kernel.
    "dsa_indexer_rotate_activation": False,
}


# Parts query, key, value, z, beta, alpha of 24, 24, 80, 80, 8, 8 rows.
DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    # A first token reads next to nothing of a state, which the norm behind it would make as large
    # as anything: rounding too.
    "layernorm_epsilon": 1e-2,
}
# As Qwen3-Next has them.
DELTA_NET = {
    **DELTA,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 2,
    "transformer_impl": "local",
    "qk_layernorm": True,
    "attention_output_gate": True,
    "layernorm_zero_centered_gamma": True,
}


def build_config(layout: Layout, **overrides: Any) -> TransformerConfig:
    """Return the configuration of a tiny gated RMSNorm model in fp32 on `layout`.

    Expert fields (`**MOE`) make it a mixture of experts, `**MLA` multi-latent attention.
    """
    config_class = MLATransformerConfig if "kv_lora_rank" in overrides else TransformerConfig
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((halves[name] for name in halves if overrides.get(name)), torch.float32)
    virtual = layout.vpp is not None
    fields: dict[str, Any] = {
        **DENSE,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "context_parallel_size": layout.cp,
        # As pretrain sets it: a sent output is freed at once.
        "deallocate_pipeline_outputs": True,
        # Two pipeline ranks with virtual stages exchange both ways at once: batched messages mix.
        "batch_p2p_comm": not virtual,
        "overlap_p2p_comm": virtual,
    }
    return config_class(**{**fields, **overrides})


def build_model(
    layout: Layout,
    *,
    vocab_size: int = VOCAB_SIZE,
    seq_length: int = SEQ_LENGTH,
    tied: bool = False,
    pattern: str | None = None,
    rotary_percent: float = 1.0,
    position_embedding_type: str = "rope",
    yarn: dict[str, Any] | None = None,
    **overrides: Any,
) -> list[Any]:
    """Build this rank's model chunks, one per virtual pipeline stage, with topology-free weights.

    `overrides` are fields of the configuration; `tied` shares embedding and output weights; `yarn`
    has the numbers of scaled rotary embeddings by the names that a GPT model reads;
    `pattern` is that of a hybrid model's layers, with "|" between pipeline stages, if any.
    Megatron's process groups must be set up for `layout`.
    """
    if pattern is not None:
        pattern = pattern if layout.pp > 1 else pattern.replace("|", "")
        overrides = {
            "is_hybrid_model": True,
            **HYBRID_LAYERS,
            "num_layers": get_hybrid_total_layer_count(pattern),
            **overrides,
        }
    config = build_config(layout, **overrides)
    vars(config).update(yarn or {})
    stages: list[int | None] = [None] if layout.vpp is None else list(range(layout.vpp))
    chunks = []
    for stage in stages:
        common = {
            "vocab_size": vocab_size,
            "max_sequence_length": seq_length,
            "pre_process": parallel_state.is_pipeline_first_stage(False, stage),
            "post_process": parallel_state.is_pipeline_last_stage(False, stage),
            "share_embeddings_and_output_weights": tied,
            "position_embedding_type": "yarn" if yarn else position_embedding_type,
            "rotary_percent": rotary_percent,
            "vp_stage": stage,
        }
        if pattern is None:
            chunk = _build_gpt(config, stage, common)
        else:
            chunk = HybridModel(config, STACK, hybrid_layer_pattern=pattern, **common)
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        draw_weights(chunk)
        chunks.append(chunk)
    return chunks


def _build_gpt(config: Any, stage: int | None, common: dict[str, Any]) -> GPTModel:
    spec: Any
    match config.experimental_attention_variant:
        case "dsa":
            spec = sparse_block(config, stage)
        case "gated_delta_net":
            spec = get_transformer_block_with_experimental_attention_variant_spec(config, stage)
        case _:
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
    if getattr(config, "mla_down_proj_fusion", False):
        # As TransformerEngine's layers have it: Megatron's own leave the setting out.
        for layer in spec.layer_specs:
            layer.submodules.self_attention.module = FusedMLASelfAttention
            layer.submodules.self_attention.submodules.linear_qkv_down_proj = ColumnParallelLinear
    mtp_spec = (
        get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
        if config.mtp_num_layers
        else None
    )
    return GPTModel(config, spec, mtp_block_spec=mtp_spec, **common)


@torch.no_grad()
def draw_weights(chunk: Any) -> None:
    """Overwrite every weight with its shard of a full tensor drawn by global name.

    Megatron's sharded checkpoint entries say which part of which global tensor a rank holds, and
    their data are views of the parameters.
    """
    filled = 0
    for shard in _parameter_shards(chunk):
        separate = isinstance(chunk, HybridModel) or chunk.config.experimental_attention_variant
        key = _separate_norm(shard.key) if separate else shard.key
        full = _draw(key, shard.global_shape, shard.prepend_axis_num)
        if chunk.config.layernorm_zero_centered_gamma and key.endswith("norm.weight"):
            full -= 1.0
        where = tuple(
            slice(offset, offset + size)
            for offset, size in zip(shard.global_offset, _shard_shape(shard), strict=True)
        )
        assert shard.data is not None
        shard.data.copy_(full[where].reshape(shard.data.shape))
        filled += shard.data.numel()
    expected = sum(weight.numel() for weight in _weights(chunk))
    assert filled == expected, f"filled {filled} of {expected} numbers"


def _weights(chunk: Any) -> list[torch.Tensor]:
    """Return what a trained model is: its parameters, and by which bias it chooses experts."""
    buffers = dict(chunk.named_buffers())
    biases = [buffer for name, buffer in buffers.items() if name.endswith("router.expert_bias")]
    return [*chunk.parameters(), *biases]


def _parameter_shards(chunk: Any) -> Iterator[ShardedTensor]:
    storages = {weight.untyped_storage().data_ptr() for weight in _weights(chunk)}
    dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries = chunk.sharded_state_dict(metadata={"dp_cp_group": dp_cp_group})
    apply_factories(entries)
    for entry in nested_values(entries):
        if not isinstance(entry, ShardedTensor) or entry.data is None:
            continue
        # Buffers such as the router's token counts keep their values.
        if entry.data.untyped_storage().data_ptr() in storages:
            yield entry


def _shard_shape(shard: ShardedTensor) -> tuple[int, ...]:
    """Return the local shape with the axes of layers and experts, of which a shard has one each."""
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def _separate_norm(key: str) -> str:
    """Name a norm that TransformerEngine fuses with a linear as hybrid and sparse local layers."""
    return (
        key.replace("mixer.in_proj.layer_norm_", "norm.")
        .replace("self_attention.in_proj.layer_norm_", "input_layernorm.")
        .replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    )


def _draw(key: str, shape: tuple[int, ...], prepended: int) -> torch.Tensor:
    """Draw a whole tensor: matrix N(0, 1 / in), norm and skip weights N(1, .1²), bias N(0, .1²)."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    full = torch.randn(shape, generator=generator)
    if len(shape) - prepended >= 2:
        return full / shape[-1] ** 0.5
    return 0.1 * full + (1.0 if key.endswith(("norm.weight", "mixer.D")) else 0.0)
