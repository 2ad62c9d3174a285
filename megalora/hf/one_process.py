"""Megatron checkpoints made and read in one process, without a launch script.

It imports Megatron: `megalora.hf.offline.prepare` comes first.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.api import CheckpointException

from megalora.adapters.factors import to_checkpoint
from megalora.adapters.kinds import kind_named
from megalora.adapters.start import draw_uniform
from megalora.checkpoint.description import HUGGING_FACE, read_sizes
from megalora.checkpoint.layout import RELEASE, find_directory, iteration_directory, write_tracker
from megalora.checkpoint.read import DESCRIPTION, read_adapter_checkpoint, read_description
from megalora.checkpoint.writers import said_of_failures
from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf
from megalora.hf.base import load_hf_base
from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors
from megalora.model.config_json import family_of, model_shape, read_config
from megalora.model.facts import ModelFacts, facts_of
from megalora.model.hybrid import is_own, refuse_other
from megalora.model.megatron import megatron_args
from megalora.model.rope import rope_without_flags, yarn_options
from megalora.model.shape import ModelShape


@contextmanager
def one_process() -> Iterator[None]:
    """Set Megatron up for this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def read_adapter(directory: str | Path) -> tuple[dict[str, Tensor], LoRAConfig, ModelFacts]:
    """Read an adapter checkpoint; see `megalora.checkpoint.read.read_adapter_checkpoint`.

    Raises ValueError for that of a hybrid model that is of no family and equals no GPT model.
    """
    with one_process():
        found = read_adapter_checkpoint(directory)
    model_type = str(stored_sizes(directory).get("model_type", ""))
    pattern = found[2].hybrid_layer_pattern
    if pattern and not is_own(pattern, model_type):
        refuse_other(pattern)
        raise ValueError(
            f"checkpoint {directory} has names of the hybrid_layer_pattern {pattern!r}, as an "
            "older megalora gave them: go on with that one, and export by it"
        )
    return found


def stored_sizes(directory: str | Path) -> dict[str, Any]:
    """Return what an adapter checkpoint, which has been read, says of its base."""
    return read_sizes(read_description(find_directory(Path(directory))) or {})


def import_factors(
    directory: str | Path,
    factors: Mapping[str, LoRAFactors],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    padded_vocab_size: int | None,
    overwrite: bool = False,
) -> None:
    """Write Hugging Face factors as an adapter checkpoint, with start values beside them.

    padded_vocab_size: rows of the unembedding's adapter; None for those that it has.
    """
    tensors = from_hf(
        factors, config, shape, padded_vocab_size=padded_vocab_size, fresh_a=draw_uniform
    )
    write_adapter_checkpoint(directory, tensors, config, shape, overwrite=overwrite)


def write_adapter_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    overwrite: bool = False,
) -> None:
    """Write full adapter tensors as an adapter checkpoint that any parallel layout loads.

    It is a release, as there was no training: --load begins at iteration 0.
    tensors: by global Megatron name, as `megalora.hf.adapters.from_hf` returns them.
    """
    facts = facts_of(shape)
    with whole_directory(directory, overwrite=overwrite) as target, one_process():
        stored = to_checkpoint(tensors, kind_named(config.kind).factors, facts)
        model: dict[str, Any] = {
            key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in stored.items()
        }
        model[DESCRIPTION] = json.dumps(
            {"config": config.to_dict(), "model": asdict(facts), HUGGING_FACE: _sizes(shape)}
        )
        _save({"model": model}, target)


def _sizes(shape: ModelShape) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "vocab_size", "model_type")
    return {name: getattr(shape, name) for name in names}


def _save(weights: Mapping[str, Any], target: Path) -> None:
    """Save weights alone, as Megatron's training does, with a manifest of checksums."""
    directory = iteration_directory(target, RELEASE)
    directory.mkdir()
    state = {**weights, "iteration": 0, "checkpoint_version": 3.0}
    # The writers of a save that is waited for are threads: Megatron would start a process, which
    # imports torch, for what they answer.
    answers = mock.patch.object(filesystem_async, "_results_queue", Queue())
    with said_of_failures() as said, answers:
        try:
            dist_checkpointing.save(state, str(directory), verify_integrity=True)
        # torch's, which is no Exception, wraps whatever a write runs into.
        except CheckpointException as error:
            reasons = said or [str(failure[0]) for failure in error.failures.values()]
            raise OSError(None, reasons[0]) from error
    write_tracker(target, RELEASE)


def import_base(
    hf_model: str | Path,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> int:
    """Write a Hugging Face directory as a Megatron checkpoint; return the number of parameters.

    It is a `release` of weights alone, in distributed format, for --pretrained-checkpoint on any
    parallel layout. This process holds the whole model. Raises ValueError where a run could not be
    told by flags what the model computes.
    """
    config = read_config(hf_model)
    family_of(config)
    if numbers := rope_without_flags(config):
        raise ValueError(
            f"config.json has {numbers} in its yarn rope, for which Megatron has no flags: a run "
            "from a checkpoint would not have them: train with --hf-model, which sets them"
        )
    inputs = {"--hf-model": hf_model}
    place = whole_directory(directory, overwrite=overwrite, inputs=inputs)
    with place as target, one_process():
        model = build_base(config, dtype)
        load_hf_base([model], hf_model, progress=progress)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        weights = {
            "model": model.sharded_state_dict(metadata={"dp_cp_group": group}),
            HUGGING_FACE: _sizes(model_shape(config)),
        }
        _save(weights, target)
        return sum(param.numel() for param in model.parameters())


def _layers(built: TransformerConfig) -> Any:
    """Return the layers of a model, Megatron's own."""
    if built.experimental_attention_variant:
        return get_transformer_block_with_experimental_attention_variant_spec(built)
    return get_gpt_decoder_block_spec(built, use_transformer_engine=False)


def build_base(config: Mapping[str, Any], dtype: torch.dtype) -> GPTModel | HybridModel:
    """Build the unsharded Megatron model that a config.json describes, weights undefined."""
    args = megatron_args(config)
    kind = MLATransformerConfig if "multi_latent_attention" in args else TransformerConfig
    known = kind.__dataclass_fields__
    pattern, is_gated = args.get("hybrid_layer_pattern"), not args.get("squared_relu")
    given = {"num_layers": len(pattern), "is_hybrid_model": True} if pattern else {}
    built = kind(
        **{name: value for name, value in {**args, **given}.items() if name in known},
        num_moe_experts=args.get("num_experts"),
        gated_linear_unit=is_gated,
        activation_func=_activation(args),
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    vars(built).update(yarn_options(args))
    options: dict[str, Any] = {
        "vocab_size": args["vocab_size"],
        "max_sequence_length": args["max_position_embeddings"],
        "position_embedding_type": args["position_embedding_type"],
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
    }
    if pattern:
        return _hybrid(built, pattern, options)
    options |= {name: args[name] for name in ("rotary_base", "rotary_percent")}
    return GPTModel(built, _layers(built), **options)


def _hybrid(built: TransformerConfig, pattern: str, options: Mapping[str, Any]) -> HybridModel:
    try:
        return HybridModel(built, hybrid_stack_spec, hybrid_layer_pattern=pattern, **options)
    except ImportError as error:
        raise ValueError(
            f"a model with the layers {pattern!r:.200} is not built here: {error}: train with "
            "--hf-model where mamba-ssm is installed"
        ) from error


def _activation(args: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    if args.get("quick_geglu"):
        return quick_gelu
    return squared_relu if args.get("squared_relu") else torch.nn.functional.silu
