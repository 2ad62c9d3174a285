"""Megatron models of Hugging Face directories, and their logits, on any layout."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megalora.hf.base import load_hf_base
from megalora.model.config_json import model_shape, read_config
from megalora.model.hybrid import hybrid_args, pattern_of
from megalora.model.megatron import megatron_args
from megalora.model.rope import yarn_options
from tests.dist.support.layouts import Layout
from tests.dist.support.models import build_model

PADDED_VOCAB = 72


def build(
    layout: Layout,
    directory: Path,
    *,
    padded_vocab: int = PADDED_VOCAB,
    hybrid: bool = False,
    **changes: Any,
) -> list[Any]:
    """Build the model that a directory's config.json describes, with other weights.

    hybrid: as the HybridModel that equals it.
    """
    config = read_config(directory)
    args = megatron_args(config)
    if hybrid or "hybrid_layer_pattern" in args:
        args = hybrid_args(args)
        stages, predictions = layout.pp * (layout.vpp or 1), changes.get("mtp_num_layers", 0)
        if "pattern" not in changes:
            pattern = pattern_of(model_shape(config), stages=stages, predictions=predictions)
            changes["pattern"] = pattern
    if "experimental_attention_variant" in args:
        changes = {"transformer_impl": "local", **changes}
    kind = MLATransformerConfig if "kv_lora_rank" in args else TransformerConfig
    known = kind.__dataclass_fields__
    fields = {name: value for name, value in args.items() if name in known}
    if "num_experts" in args:
        fields["num_moe_experts"] = args["num_experts"]
    if args.get("quick_geglu"):
        fields["activation_func"] = quick_gelu
    if args.get("squared_relu"):
        fields |= {"activation_func": squared_relu, "gated_linear_unit": False}
    if scaled := yarn_options(args):
        changes["yarn"] = {**scaled, **changes.get("yarn", {})}
    options = ("rotary_percent", "position_embedding_type")
    return build_model(
        layout,
        vocab_size=padded_vocab,
        tied=not args["untie_embeddings_and_output_weights"],
        **{**{name: args[name] for name in options if name in args}, **fields, **changes},
    )


def load(layout: Layout, directory: Path, **options: Any) -> list[Any]:
    """Build the model of a directory, with options of `build`, and load its weights."""
    chunks = build(layout, directory, **options)
    load_hf_base(chunks, directory)
    return chunks


@torch.no_grad()
def logits(chunks: list[Any], ids: torch.Tensor) -> torch.Tensor:
    """Return [b, s, padded vocabulary] on every rank, through all pipeline stages."""

    def step(_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        return model(ids, positions, None), lambda output, non_loss_data: output

    for chunk in chunks:
        chunk.eval()
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    tp = parallel_state.get_tensor_model_parallel_group()
    whole = torch.zeros(ids.shape[0], ids.shape[1], PADDED_VOCAB)
    if parallel_state.is_pipeline_last_stage():
        parts = [torch.empty_like(found[0]) for _ in range(tp.size())]
        dist.all_gather(parts, found[0].contiguous(), group=tp)
        whole = torch.cat(parts, dim=-1)
    stages = parallel_state.get_pipeline_model_parallel_group()
    if stages.size() > 1:
        dist.broadcast(whole, parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
    return whole
