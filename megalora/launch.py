"""LoRA in one training run: what a launch script calls between parsing flags and `pretrain`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from megalora.arguments import lora_config_from_args
from megalora.config import LoRAConfig

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]


def add_exchange_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that bring base weights and adapters in and take adapters out."""
    group = parser.add_argument_group("exchange", "with Hugging Face directories")
    add = group.add_argument
    add("--hf-model", help="directory with config.json and safetensors: builds and loads the base")
    add("--lora-load", help="PEFT directory or adapter checkpoint to start from")
    add("--export-hf", help="directory to write the adapter to after training, in PEFT's format")
    add("--export-format", default="peft", choices=("peft", "uniform", "peft-3d"))
    return parser


class LoRARun:
    """The adapters of one run, from flags to export.

    args: Megatron's parsed flags with those of `add_lora_args` and `add_exchange_args`.
    Raises ValueError where the flags cannot be right, before anything is built.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config: LoRAConfig | None = lora_config_from_args(args)
        self.model: ModelChunks = []
        if self.config is not None and args.num_experts:
            self.config.resolve_expert_rank(args.moe_router_topk)
        for flag in ("lora_load", "export_hf"):
            if self.config is None and getattr(args, flag):
                raise ValueError(f"{flag} is {getattr(args, flag)!r} without LoRA: set --lora-rank")
        for flag in ("hf_model", "lora_load"):
            path = getattr(args, flag)
            if path and not Path(path).exists():
                raise ValueError(f"{flag} {path!r} does not exist: give an existing directory")
        if self.config is not None:
            install_optimizer_overrides(self.config)

    def hooks(self) -> list[Hook]:
        """Return the hooks for `GPTModelConfig.pre_wrap_hooks`."""
        return [self.prepare]

    def prepare(self, model_chunks: ModelChunks) -> ModelChunks:
        """Load the base where a directory is given, attach the adapters, load them where given."""
        if self.args.hf_model:
            from megalora.hf.base import load_hf_base

            load_hf_base(model_chunks, self.args.hf_model)
        if self.config is None:
            return model_chunks
        from megalora.builder import apply_lora

        self.model = apply_lora(model_chunks, self.config)
        if self.args.lora_load:
            from megalora.hf.adapters import load_into_model

            load_into_model(self.model, self.args.lora_load, self.config)
        _report(self.model)
        return self.model

    def export(self) -> None:
        """Write the trained adapter as a PEFT directory where --export-hf asks for it."""
        if not self.args.export_hf or not self.model:
            return
        from megalora.hf.adapters import export_model

        export_model(
            self.model,
            self.args.export_hf,
            format=self.args.export_format,
            base_model_name=self.args.hf_model,
        )


def install_optimizer_overrides(config: LoRAConfig) -> None:
    """Give A and B their own learning rate and Adam epsilon, where the configuration asks.

    Megatron reads its optimizer groups from `get_megatron_optimizer_config`: overrides are added
    to what it returns.
    """
    if config.lr_ratio == 1.0 and config.eps_a is None and config.eps_b is None:
        return
    from megatron.training import training

    original = training.get_megatron_optimizer_config

    def with_overrides(args: argparse.Namespace) -> tuple[Any, dict]:
        optimizer_config, overrides = cast(tuple[Any, dict | None], original(args))
        return optimizer_config, {**(overrides or {}), **factor_overrides(config, args)}

    training.get_megatron_optimizer_config = with_overrides


def factor_overrides(config: LoRAConfig, args: argparse.Namespace) -> dict[Any, Any]:
    """Return Megatron's optimizer overrides for lora_A and lora_B."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    overrides = {}
    for factor, eps, ratio in (
        ("lora_A", config.eps_a, 1.0),
        ("lora_B", config.eps_b, config.lr_ratio),
    ):
        change: dict[str, float] = {} if eps is None else {"eps": eps}
        if ratio != 1.0:
            change |= {"max_lr": args.lr * ratio, "min_lr": (args.min_lr or 0.0) * ratio}
        if change:
            is_factor = ParamPredicate(
                name=factor, fn=lambda param, f=factor: getattr(param, "lora_factor", None) == f
            )
            overrides[ParamKey(predicate=is_factor)] = change
    return overrides


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End a script with one message where the user's input is wrong, on one rank of each node."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        message = f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else ""
        sys.stdout.flush()
        raise SystemExit(message or 1) from None


def _report(model_chunks: ModelChunks) -> None:
    from megatron.training import print_rank_0

    trained = sum(
        p.numel() for chunk in model_chunks for p in chunk.parameters() if p.requires_grad
    )
    frozen = sum(p.numel() for chunk in model_chunks for p in chunk.parameters()) - trained
    print_rank_0(
        f"> LoRA: {trained:,} trained parameters on this rank beside {frozen:,} frozen ones "
        f"({trained / max(1, trained + frozen):.2%})"
    )
