"""The engine that the flags of a run name, and what it cannot do. Imports Megatron."""

import argparse
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megalora.config import LoRAConfig
from megalora.rollouts.engine import Engine
from megalora.rollouts.megatron import MegatronEngine
from megalora.rollouts.sglang import SGLangEngine
from megalora.rollouts.supported import check_supported
from megalora.rollouts.vllm import VLLMEngine
from megalora.sync.http import Http
from megalora.sync.tensors import RunningAdapters
from megalora.sync.versions import VersionedDirectory


class ModelConfig(Protocol):
    """Megatron's configuration of a model to build."""

    @property
    def transformer(self) -> TransformerConfig:
        """Return that of its layers."""
        ...


def check_engine(args: argparse.Namespace, model_config: ModelConfig) -> None:
    """Raise ValueError where --rollout cannot do what other flags say, before a model is built."""
    if args.rollout == "megatron":
        check_supported(
            model_config.transformer,  # type: ignore[arg-type]
            num_chunks=1,
            position_embedding_type=args.position_embedding_type,
            hybrid_layer_pattern=args.hybrid_layer_pattern or "",
        )


def make_engine(
    args: argparse.Namespace,
    model_chunks: Sequence[torch.nn.Module],
    config: LoRAConfig,
    *,
    say: Callable[[str], None],
) -> Engine:
    """Return what samples from a running model's adapters, as --rollout says.

    All ranks must call it. say: receives what the server has to be started with. Raises ValueError
    where the model or the flags are none that the engine can do.
    """
    at_once = args.rollout_batch_size
    if args.rollout == "megatron":
        return MegatronEngine(model_chunks, max_batch_size=at_once)
    server = Http(url=args.rollout_url, timeout_s=args.rollout_timeout)
    adapters = RunningAdapters(
        model_chunks,
        config,
        server=args.rollout,
        hf_model=args.hf_model,
        vocab_size=args.vocab_size,
        base_model_name=args.hf_model or "",
    )
    for note in adapters.notes:
        say(f"> {args.rollout}: {note}")
    if args.rollout == "sglang":
        return SGLangEngine(adapters, server, concurrency=at_once)
    directory = VersionedDirectory(args.rollout_directory)
    return VLLMEngine(adapters, server, directory, concurrency=at_once)
