"""LoRA in one training run: what a launch script calls between parsing flags and `pretrain`."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from megalora import cpu
from megalora.arguments import given_lora_fields, lora_config_from_args
from megalora.checkpoint.schedule import take_rates
from megalora.config import LoRAConfig
from megalora.model.shape import refuse_hybrid
from megalora.training.auto_lr import set_auto_lr
from megalora.training.flags import (
    add_exchange_args,
    check_checkpoint_args,
    check_same_optimizer,
    refuse_fsdp,
    with_hf_flags,
)
from megalora.training.outputs import (
    at_end,
    check_output_args,
    check_outputs,
    outputs_have_to_wait,
    say_how_to_write,
    write_outputs,
)
from megalora.training.rates import factor_overrides

# NOTE: scripts import this before `prepare_megatron`: only functions import megatron.
if TYPE_CHECKING:
    from megalora.checkpoint.find import Found

# All that a launch script needs, from one module.
__all__ = [
    "LoRARun",
    "add_exchange_args",
    "at_end",
    "clear_errors",
    "prepare_megatron",
    "with_hf_flags",
]

ModelChunks = list[torch.nn.Module]
Hook = Callable[[ModelChunks], ModelChunks]


def prepare_megatron(argv: Sequence[str]) -> None:
    """Mend Megatron for the device of this run; to be called before megatron is imported.

    argv: the run's flags, for --cpu. Ends the run on a rank that was meant for a GPU and has none.
    """
    # Any rank may be the one, so it says so itself.
    with clear_errors(every_rank=True):
        cpu.install_if_wanted(argv)
    from megalora import mends

    mends.install()


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
        for flag in ("lora_load", "export_hf", "save_merged"):
            if self.config is None and getattr(args, flag):
                raise ValueError(f"{flag} is {getattr(args, flag)!r} without LoRA: set --lora-rank")
        for flag in ("hf_model", "lora_load"):
            path = getattr(args, flag)
            if path and not Path(path).exists():
                raise ValueError(f"{flag} {path!r} does not exist: give an existing directory")
        for flag in ("hf_model", "export_hf"):
            if getattr(args, flag):
                refuse_hybrid(getattr(args, "hybrid_layer_pattern", None))
        check_output_args(args)
        if args.hf_model and args.pretrained_checkpoint:
            raise ValueError(
                f"hf_model {args.hf_model!r} and pretrained_checkpoint "
                f"{args.pretrained_checkpoint!r} are two bases: leave one of them out"
            )
        set_auto_lr(args, self.config)
        if self.config is not None:
            refuse_fsdp(args)
            check_checkpoint_args(args)
            self._install_optimizer_overrides()
            from megalora.checkpoint import find, save

            save.install()
            find.end_where_done()

    def hooks(self) -> list[Hook]:
        """Return the hooks for the `pre_wrap_hooks` of a model configuration."""
        return [self.prepare]

    def prepare(self, model_chunks: ModelChunks) -> ModelChunks:
        """Load the base, attach the adapters, load those that --lora-load names.

        What Megatron itself then loads is an adapter checkpoint in --load, where there is one.
        """
        found = self._find_checkpoint()
        if self.config is None:
            if self.args.hf_model:
                self._load_hf_base(model_chunks)
            return model_chunks
        from megalora.builder import apply_lora
        from megalora.checkpoint.base import fingerprint
        from megalora.checkpoint.state import describe_base

        description = found.description if found else None
        self.config = resumed_config(self.args, description)
        if description is not None:
            check_same_optimizer(self.args, description)
            take_rates(self.args, description["schedule"])
        source = self._load_base(model_chunks, found)
        base = {"source": source, **fingerprint(model_chunks)}
        if description is not None:
            self._check_base(description.get("base"), base)
        self.model = apply_lora(model_chunks, self.config)
        describe_base(self.model, base)
        if self.args.lora_load and description is None:
            from megalora.hf.exchange import load_adapter

            load_adapter(self.model, self.args.lora_load, self.config)
        self._leave_adapters_to_megatron(has_adapters=description is not None)
        check_outputs(self.model, self.args, self.config)
        _report(self.model)
        return self.model

    def finish(self, *, early: bool = False) -> None:
        """Write what --export-hf and --save-merged ask for; after a signal, say how to get it.

        early: Megatron ended the script (see `at_end`).
        """
        args = self.args
        is_trained = hasattr(args, "curr_iteration") or not args.exit_on_missing_checkpoint
        if not self.model or self.config is None or (early and not is_trained):
            return
        # --exit-signal-handler-for-training has ended the process groups too.
        if early and (not torch.distributed.is_initialized() or outputs_have_to_wait(args)):
            say_how_to_write(args, self.config)
        else:
            write_outputs(self.model, args, self.config)

    def _find_checkpoint(self) -> "Found | None":
        from megalora.checkpoint.find import find_on_all_ranks

        args = self.args
        found = find_on_all_ranks(
            args.load, step=args.ckpt_step, on_corrupt=args.lora_on_corrupt, warn=_say
        )
        description = found.description if found else None
        if description is not None and self.config is None:
            rank = description["config"]["rank"]
            raise ValueError(
                f"load {args.load!r} holds LoRA adapters of rank {rank}: set --lora-rank {rank} to "
                "go on with them, or give another --load directory"
            )
        if description is not None and args.finetune:
            raise ValueError(
                f"load {args.load!r} holds adapters, which --finetune cannot start from: give the "
                "directory by --lora-load, and the base by --pretrained-checkpoint"
            )
        if found and description is None and self.config is not None and not args.finetune:
            raise ValueError(
                f"load {args.load!r} holds a whole model, which an adapter run cannot resume: give "
                "the directory by --pretrained-checkpoint, or add --finetune"
            )
        return found

    def _load_base(self, model_chunks: ModelChunks, found: "Found | None") -> str | None:
        """Load the base that the flags name, and return where it is from."""
        from megalora.checkpoint.base import load_base

        args = self.args
        whole_model = found is not None and found.description is None
        if args.hf_model:
            self._load_hf_base(model_chunks)
            return str(Path(args.hf_model).resolve())
        directory = args.load if whole_model else args.pretrained_checkpoint
        if not directory:
            return None
        step = args.ckpt_step if whole_model else None
        load_base(model_chunks, directory, args, step=step, is_verified=whole_model)
        return str(Path(directory).resolve())

    def _load_hf_base(self, model_chunks: ModelChunks) -> None:
        from megalora.hf.base import load_hf_base

        load_hf_base(model_chunks, self.args.hf_model)

    def _check_base(self, stored: dict[str, Any] | None, own: dict[str, Any]) -> None:
        """Raise ValueError where this base is not the one that the adapters were trained on."""
        from megalora.checkpoint.base import differences

        if stored is None:
            _say("WARNING: checkpoint does not say which base its adapters were trained on")
            return
        wrong = differences(stored, own)
        if not wrong:
            return
        trained_on = stored["source"] or "start values that this model does not have"
        message = (
            f"base is {own['source'] or 'not given, so it has random start values'}, but the "
            f"adapters of load {self.args.load!r} were trained on {trained_on}: "
            f"{'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        )
        if not self.args.lora_allow_other_base:
            raise ValueError(
                f"{message}. Give that base by --pretrained-checkpoint or --hf-model, or set "
                "--lora-allow-other-base"
            )
        _say(f"WARNING: {message}")

    def _leave_adapters_to_megatron(self, *, has_adapters: bool) -> None:
        """Keep Megatron from loading the base once more, or over the adapters."""
        args = self.args
        args.pretrained_checkpoint = None
        args.finetune = False
        wants_exit = args.exit_on_missing_checkpoint and args.load
        if not has_adapters and not wants_exit and args.non_persistent_ckpt_type is None:
            args.load = None

    def _install_optimizer_overrides(self) -> None:
        """Give A and B their own learning rate and Adam epsilon, where the configuration asks.

        Megatron reads its optimizer groups from `get_megatron_optimizer_config`: overrides are
        added to what it returns. A resumed run knows its configuration only once it is called.
        """
        from megatron.training import training

        original = training.get_megatron_optimizer_config

        def with_overrides(args: argparse.Namespace) -> tuple[Any, dict | None]:
            optimizer_config, overrides = cast(tuple[Any, dict | None], original(args))
            assert self.config is not None
            added = factor_overrides(self.config, args)
            return optimizer_config, {**(overrides or {}), **added} if added else overrides

        training.get_megatron_optimizer_config = with_overrides


def resumed_config(args: argparse.Namespace, description: dict[str, Any] | None) -> LoRAConfig:
    """Return the configuration of the flags; those left out come from the checkpoint.

    description: what the checkpoint stores; None for a new run, whose flags have defaults. Raises
    ValueError where a flag contradicts the checkpoint, naming it.
    """
    given = {**given_lora_fields(args), "rank": args.lora_rank}
    if description is None:
        return LoRAConfig(**given)
    from megalora.checkpoint.state import check_same_adapters

    stored = {name: value for name, value in description["config"].items() if name != "ops"}
    config = LoRAConfig.from_dict({**stored, **given})
    check_same_adapters(description, {**description, "config": config.to_dict()})
    return config


@contextlib.contextmanager
def clear_errors(*, every_rank: bool = False) -> Iterator[None]:
    """End a script with one message where the user's input is wrong, on one rank of each node.

    every_rank: let every rank that fails say why.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("MEGALORA_TRACEBACK"):
            raise
        speaks = every_rank or os.environ.get("LOCAL_RANK", "0") == "0"
        message = f"error: {error}" if speaks else ""
        sys.stdout.flush()
        raise SystemExit(message or 1) from None


def _say(message: str) -> None:
    from megatron.training import print_rank_0

    print_rank_0(message)


def _report(model_chunks: ModelChunks) -> None:
    trained = sum(
        p.numel() for chunk in model_chunks for p in chunk.parameters() if p.requires_grad
    )
    frozen = sum(p.numel() for chunk in model_chunks for p in chunk.parameters()) - trained
    _say(
        f"> LoRA: {trained:,} trained parameters on this rank beside {frozen:,} frozen ones "
        f"({trained / max(1, trained + frozen):.2%})"
    )
