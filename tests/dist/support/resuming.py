"""Runs that save and resume by Megatron's own functions, inside a world that has started already.

Flags, optimizer, scheduler, saving and loading are those that `pretrain` uses, with what megalora
changes in them; only the model and the loop over batches are the tests' own.
"""

import argparse
import dataclasses
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator, tensor_parallel
from megatron.training import arguments, global_vars, initialize, training

from megalora.arguments import add_lora_args
from megalora.builder import apply_lora
from megalora.checkpoint import save
from megalora.checkpoint.find import find_on_all_ranks
from megalora.checkpoint.schedule import take_rates
from megalora.config import LoRAConfig
from megalora.training.flags import add_exchange_args, check_checkpoint_args
from megalora.training.rates import factor_overrides
from tests.dist.support.cases import KINDS
from tests.dist.support.layouts import Layout
from tests.dist.support.models import build_model
from tests.dist.support.training import NUM_SEQUENCES, Run, Trainer

ITERATIONS = 4
HALF = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained, on which layout. flags: as on the command line of a run."""

    layout: Layout
    kind: str = "dense"
    targets: tuple[str, ...] = ("all",)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: str = ""

    def __str__(self) -> str:
        """Name the cell, as in `pp2 dense unembed --bf16`."""
        changed = [f"{name}={value}" for name, value in (self.model | self.lora).items()]
        return " ".join([str(self.layout), self.kind, *self.targets, *changed, self.flags]).strip()

    def config(self, **changes: Any) -> LoRAConfig:
        """Return the adapters' configuration."""
        given = {"rank": 4, "alpha": 6.0, **KINDS[self.kind].lora, "targets": self.targets}
        return LoRAConfig(**{**given, **self.lora, **changes})


class Resumable:
    """A run of a cell that has just started: model, optimizer, scheduler and Megatron's flags.

    flags: further ones; lora: other fields of the adapters. Megatron's process groups must be set
    up for the cell's layout.
    """

    def __init__(self, cell: Cell, directory: Path, flags: str = "", **lora: Any) -> None:
        self.args = _args(cell, directory, flags)
        found = find_on_all_ranks(str(directory), step=None, on_corrupt="stop", warn=print)
        take_rates(self.args, found and found.description and found.description["schedule"])
        halves = {name: True for name in ("bf16", "fp16") if getattr(self.args, name)}
        config = cell.config(**lora)
        chunks = build_model(cell.layout, **{**KINDS[cell.kind].model, **halves, **cell.model})
        chunks = apply_lora(chunks, config)
        for chunk in chunks:
            chunk.config.calculate_per_token_loss = True
        is_distributed = self.args.use_distributed_optimizer

        def optimizer(models: list[Any]) -> Any:
            made, overrides = training.get_megatron_optimizer_config(self.args)
            overrides = {**(overrides or {}), **factor_overrides(config, self.args)}
            return training.get_megatron_optimizer(made, models, overrides)

        run = Run(distributed_optimizer=is_distributed)
        self.chunks = chunks
        self.trainer = Trainer(chunks, cell.layout, run, optimizer)
        self.optimizer = self.trainer.optimizer
        self.scheduler = training.get_optimizer_param_scheduler(self.optimizer)
        self.iteration = 0

    def go_on(self, iterations: int = HALF) -> list[tuple[float, float, float]]:
        """Train; return loss, gradient norm and a random number of every iteration."""
        history = []
        for _ in range(iterations):
            loss, norm = self.trainer.step(self.iteration)
            self.scheduler.step(NUM_SEQUENCES)
            history.append((loss, norm, random.random() + float(torch.rand(()))))
            self.iteration += 1
        return history

    def save(self) -> None:
        """Save as training does, and wait for it."""
        self.args.consumed_train_samples = self.iteration * NUM_SEQUENCES
        chunks = self.trainer.models
        training.save_checkpoint(self.iteration, chunks, self.optimizer, self.scheduler, 0)

    def finish_saving(self) -> None:
        """Wait for what is being written asynchronously."""
        training.maybe_finalize_async_save(blocking=True, terminate=True)

    def load(self) -> None:
        """Go on from the newest checkpoint, as training does."""
        chunks = self.trainer.models
        self.iteration, _ = training.load_checkpoint(chunks, self.optimizer, self.scheduler)

    def take_schedule(self, other: "Resumable") -> None:
        """Follow another run's schedule from this run's place in it."""
        self.scheduler, done = other.scheduler, self.scheduler.num_steps
        self.scheduler.optimizer = self.optimizer
        self.scheduler.step(done)

    def state(self) -> dict[str, Any]:
        """Return all that decides how this rank goes on, by name."""
        return dict(self._state())

    def _state(self) -> Iterator[tuple[str, Any]]:
        for number, model in enumerate(self.trainer.models):
            for name, param in model.named_parameters():
                if param.requires_grad:
                    yield f"{number}.{name}", param.detach().clone()
        for number, part in enumerate(self.optimizer.chained_optimizers):
            if (scaler := getattr(part, "grad_scaler", None)) is not None:
                yield f"{number}.scaler", scaler.state_dict()
            for group_number, group in enumerate(part.optimizer.param_groups):
                values = {key: value for key, value in group.items() if key != "params"}
                # Where nothing is trained, no step is counted until a checkpoint is written.
                steps = values.pop("step", None)
                yield f"{number}.{group_number}", values
                for index, param in enumerate(group["params"]):
                    name = f"{number}.{group_number}.{index}"
                    yield f"{name}.main", param.detach().clone()
                    yield f"{name}.step", steps
                    for key, value in part.optimizer.state[param].items():
                        yield f"{name}.{key}", value.clone()
        yield "scheduler", self.scheduler.state_dict()
        yield "random", torch.get_rng_state()
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        for key, value in tracker.get_states().items():
            # NOTE: Megatron saves that of the first expert-parallel rank alone. Nothing draws from
            # it after the start values, but for --moe-router-force-load-balancing.
            if key != "expert-parallel-rng":
                yield f"random.{key}", value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what is not the same bit for bit on any rank."""
    own = sorted(one.keys() ^ other.keys())
    own += [name for name in one if name in other and not _same(one[name], other[name])]
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own)
    return [f"{name} on rank {rank}" for rank, names in enumerate(everywhere) for name in names]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def shared_directory(tmp_path: Path) -> Path:
    """Return the first rank's directory on all ranks."""
    found = [tmp_path]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _args(cell: Cell, directory: Path, flags: str) -> argparse.Namespace:
    """Parse and check a run's flags, and make them Megatron's own."""
    words = [
        *("run", "--lr", "1e-2", "--lr-decay-style", "constant", "--weight-decay", "0.1"),
        *("--train-iters", str(ITERATIONS), "--global-batch-size", str(NUM_SEQUENCES)),
        *("--save", str(directory), "--load", str(directory), "--lora-rank", "4"),
        *("--tensor-model-parallel-size", str(cell.layout.tp)),
        *("--pipeline-model-parallel-size", str(cell.layout.pp)),
        # Of no model here, but Megatron wants them.
        *shlex.split("--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 16"),
        *shlex.split("--max-position-embeddings 16 --micro-batch-size 1"),
        *cell.flags.split(),
        *flags.split(),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        args = arguments.parse_args(lambda parser: add_exchange_args(add_lora_args(parser)))
        arguments.validate_args(args)
    check_checkpoint_args(args)
    global_vars.set_args(args)
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(
        args.rank, None, NUM_SEQUENCES, 1, cell.layout.dp
    )
    initialize._set_random_seed(args.seed)
    save.install()
    return args
