"""Megatron checkpoints made and read in one process, without a launch script."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from megalora.checkpoint.layout import RELEASE, Iteration, iteration_directory, write_tracker
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.files import whole_directory
from megalora.hf.linears import locate
from megalora.model.config_json import family_of, read_config
from megalora.model.megatron import megatron_args
from megalora.model.shape import ModelShape, refuse_hybrid
from megalora.targets import ModelFacts


def prepare() -> None:
    """Make megatron importable: on the CPU where there is no GPU."""
    from megalora import cpu, mends

    if cpu.wanted([]):
        cpu.install()
    mends.install()


@contextmanager
def one_process() -> Iterator[None]:
    """Set Megatron up for this process alone, on the CPU where there is no GPU."""
    prepare()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

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

    Raises ValueError for that of a hybrid model.
    """
    with one_process():
        from megalora.checkpoint.read import read_adapter_checkpoint

        found = read_adapter_checkpoint(directory)
    refuse_hybrid(found[2].hybrid_layer_pattern)
    return found


def checkpoint_shape(
    tensors: Mapping[str, Tensor], facts: ModelFacts, *, vocab_size: int
) -> ModelShape:
    """Return the sizes of a model of which only its adapters are known.

    Layers without an adapter after the last one that has one are not counted.
    """
    layers = [int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")]
    wide = ("linear_qkv_lora.lora_A", "linear_fc1_lora.lora_A", "output_layer_lora.lora_A")
    hidden = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(wide)]
    narrow = ("linear_proj_lora.lora_B", "linear_fc2_lora.lora_B")
    hidden += [tensor.shape[-2] for name, tensor in tensors.items() if name.endswith(narrow)]
    if not hidden:
        raise ValueError("checkpoint has no adapters that Hugging Face's models have")
    return ModelShape.from_mapping(
        {
            **asdict(facts),
            "num_layers": max(layers, default=0) + 1,
            "hidden_size": hidden[0],
            "vocab_size": vocab_size,
        }
    )


def infer_config(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> LoRAConfig:
    """Return the smallest configuration that holds these factors.

    Alpha is that of the largest dense module; scales that differ from it are folded into B.
    """
    experts: list[LoRAFactors] = []
    dense: list[LoRAFactors] = []
    targets: set[str] = set()
    for name, module in factors.items():
        place = locate(name, shape)
        if place is None:
            raise ValueError(f"adapter has {name}, which the base does not have")
        (experts if place[1].is_expert else dense).append(module.trimmed())
        targets.add(place[1].megatron)
    rank = max((module.rank for module in dense), default=0)
    expert_rank = max((module.rank for module in experts), default=None)
    rank = rank or (expert_rank or 1) * shape.moe_router_topk
    largest = max(dense or experts, key=lambda module: module.rank)
    alpha = largest.scale * (largest.rank if not dense else rank)
    alpha = round(alpha) if same_scale(alpha, round(alpha)) else alpha
    return LoRAConfig(
        rank=rank, expert_rank=expert_rank, alpha=alpha, targets=tuple(sorted(targets))
    )


def write_adapter_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    overwrite: bool = False,
) -> None:
    """Write full adapter tensors as an adapter checkpoint that any parallel layout loads.

    tensors: by global Megatron name, as `megalora.hf.adapters.from_hf` returns them.
    """
    facts = ModelFacts(
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        gated_linear_unit=True,
        moe_router_topk=shape.moe_router_topk,
        num_moe_experts=shape.num_moe_experts,
        moe_layer_freq=shape.moe_layer_freq,
    )
    with whole_directory(directory, overwrite=overwrite) as target, one_process():
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        from megalora.adapters.factors import to_checkpoint
        from megalora.adapters.kinds import kind_named
        from megalora.checkpoint.read import DESCRIPTION

        stored = to_checkpoint(tensors, kind_named(config.kind).factors, facts)
        model: dict[str, Any] = {
            key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in stored.items()
        }
        model[DESCRIPTION] = json.dumps({"config": config.to_dict(), "model": asdict(facts)})
        _save(model, target, 0)


def _save(model: Mapping[str, Any], target: Path, iteration: Iteration) -> None:
    """Save weights as Megatron's training does, with a manifest of checksums."""
    from megatron.core import dist_checkpointing

    directory = iteration_directory(target, iteration)
    directory.mkdir()
    state = {"model": model, "iteration": 0, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(directory), verify_integrity=True)
    write_tracker(target, iteration)


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
    parallel layout. This process holds the whole model.
    """
    config = read_config(hf_model)
    family_of(config)
    with whole_directory(directory, overwrite=overwrite) as target, one_process():
        from megatron.core import parallel_state

        model = build_base(config, dtype)
        load_hf_base([model], hf_model, progress=progress)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        _save(model.sharded_state_dict(metadata={"dp_cp_group": group}), target, RELEASE)
        return sum(param.numel() for param in model.parameters())


def build_base(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the unsharded Megatron model that a config.json describes, weights undefined."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    args = megatron_args(config)
    fields = TransformerConfig.__dataclass_fields__
    sizes = {name: value for name, value in args.items() if name in fields}
    built = TransformerConfig(
        **sizes,
        num_moe_experts=args.get("num_experts"),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    spec: Any = get_gpt_decoder_block_spec(built, use_transformer_engine=False)
    return GPTModel(
        built,
        spec,
        vocab_size=args["vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=args["rotary_base"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
    )
