"""A step of a tiny model as it is planned, on shapes in a world without others, and as it runs."""

import argparse
import contextlib
import inspect
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from torch import Tensor

from megalora.builder import apply_lora
from megalora.cpu import cuda_facade
from megalora.plan.assumed import even_use
from megalora.plan.contract import LinearTraffic, contract
from megalora.plan.meter import FORWARD, Meter
from megalora.plan.step import run_step
from megalora.plan.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    BROADCAST,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Traffic,
    in_a_step,
    traffic,
)
from megalora.plan.traffic import KINDS as NAMES
from megalora.plan.work import Work, work
from tests.dist.support import models
from tests.dist.support.cases import KINDS, Case
from tests.dist.support.layouts import model_parallel
from tests.dist.support.parity import lora_config
from tests.dist.support.training import NUM_SEQUENCES, SEQ_LENGTH, Trainer
from tests.support.plans import in_a_world

# By kind and ranks, all of them or their number: how often a step has it, and the bytes of the
# larger side.
type Sent = dict[tuple[str, Any], tuple[int, int]]


class Found(NamedTuple):
    """What a step of a case sends, in all and for the adapters, and what else its plan says."""

    sent: Sent
    adapters: Sent
    traffic: list[Traffic]
    contract: list[LinearTraffic]
    work: Work
    microbatches: int


def trainer_of(case: Case, lora: bool) -> Trainer:
    """Build the model of a case and all that trains it, the base where there are no adapters."""
    kind, run = KINDS[case.kind], case.run
    chunks = models.build_model(case.layout, **{**kind.model, **case.fields})
    if lora:
        apply_lora(chunks, lora_config(case.kind))
    # As pretrain does: in a plan it makes shapes of what is on the CPU.
    trainer = Trainer([chunk.cuda() for chunk in chunks], case.layout, run)
    if run.overlap:
        syncs = [model.no_sync for model in trainer.models]
        get_model_config(chunks[0]).no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return trainer


def planned(case: Case, lora: bool) -> Found:
    """Plan a step of this rank in a process of its own, without the others of this world."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_plan, args=(sender, dist.get_rank(), case, lora))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _plan(sender: Any, rank: int, case: Case, lora: bool) -> None:
    # The groups of the world that was forked stay what they are, and are nobody's.
    dist.distributed_c10d._update_default_pg(None)
    try:
        sender.send(_planned(rank, case, lora))
    except Exception:
        traceback.print_exc()
    finally:
        sender.close()
        os._exit(0)


def _planned(rank: int, case: Case, lora: bool) -> Found:
    layout, run = case.layout, case.run
    quiet = mock.patch.object(models, "draw_weights")
    shared = mock.patch.object(ChainedOptimizer, "grads_states_parallel_group_is_shared", _shared)
    with in_a_world(rank, layout.world_size), quiet, shared:
        dist.init_process_group("nccl")
        # Ranks that compare flags where groups are made do so in numbers.
        with model_parallel(layout), cuda_facade.on_meta():
            trainer = trainer_of(case, lora)
            batch, meter = NUM_SEQUENCES, Meter()
            # Another test may have made one.
            num_microbatches_calculator.unset_num_microbatches_calculator()
            num_microbatches_calculator.init_num_microbatches_calculator(
                rank, None, batch, run.size_on(layout), layout.dp, False
            )
            args = argparse.Namespace(
                seq_length=SEQ_LENGTH,
                micro_batch_size=run.size_on(layout),
                context_parallel_size=layout.cp,
                virtual_pipeline_model_parallel_size=layout.vpp,
                overlap_grad_reduce=run.overlap,
                align_grad_reduce=False,
                overlap_param_gather=run.overlap and run.distributed_optimizer,
                align_param_gather=False,
            )
            step = run_step(trainer.models, trainer.optimizer, args, meter)
            tokens = run.size_on(layout) * SEQ_LENGTH // layout.cp
            return Found(
                _sent(meter, step),
                _sent(meter, step, "megalora.adapters"),
                traffic(meter, step, gpus_per_node=8),
                contract(trainer.models, tokens=tokens),
                work(meter, step),
                step.all_microbatches,
            )


def _shared(self: ChainedOptimizer) -> bool:
    """Say whether optimizers sum their norms in one group: on gloo, one of the same ranks."""
    groups = (one.get_grad_stats_parallel_group() for one in self.chained_optimizers)
    return len({tuple(dist.get_process_group_ranks(group)) for group in groups}) == 1


def by_contract(plan: Found, *, recomputed: bool) -> Sent:
    """Return what adapters send in a step by their routes; all but the output layer's twice."""
    calls: Counter[Any] = Counter()
    sizes: Counter[Any] = Counter()
    for one in plan.contract:
        again = recomputed and one.way == FORWARD and one.linear != "output_layer"
        times = plan.microbatches * (2 if again else 1)
        calls[one.kind, one.ranks] += times * one.calls
        sizes[one.kind, one.ranks] += times * one.size
    return {key: (calls[key], sizes[key]) for key in calls}


def _sent(meter: Meter, step: Any, owner: str = "mega") -> Sent:
    """Return what a step sends; what the tests themselves ask for is left out."""
    calls: Counter[Any] = Counter()
    sizes: Counter[Any] = Counter()
    for call, number in meter.calls.items():
        if len(call.ranks) > 1 and call.owner.startswith(owner):
            key = NAMES.get(call.kind, call.kind), call.ranks
            calls[key] += in_a_step(number, call, step) if step else number
            size = meter.sent[call]
            sizes[key] += in_a_step(size, call, step) if step else size
    return {key: (calls[key], sizes[key]) for key in calls}


def ran(case: Case, lora: bool) -> tuple[Sent, Sent, Sent]:
    """Run steps; return what one sends as it is metered, of adapters, and as it is asked for.

    Experts are used evenly, as a plan takes for given.
    """
    evenly = mock.patch.object(TopKRouter, "routing", even_use(TopKRouter.routing))
    with model_parallel(case.layout), evenly:
        trainer = trainer_of(case, lora)
        trainer.step(0)
        with Meter(torch.device("cpu")) as meter:
            trainer.step(1)
        with Asked() as asked:
            trainer.step(2)
    return _sent(meter, None), _sent(meter, None, "megalora.adapters"), asked.sent()


# Functions of torch.distributed, by what a plan calls what they do.
FUNCTIONS = {
    "all_gather_into_tensor": ALL_GATHER,
    "all_gather": ALL_GATHER,
    "reduce_scatter_tensor": REDUCE_SCATTER,
    "reduce_scatter": REDUCE_SCATTER,
    "all_reduce": ALL_REDUCE,
    "all_to_all_single": ALL_TO_ALL,
    "broadcast": BROADCAST,
    "isend": SEND,
    "irecv": RECEIVE,
}
# Where Megatron keeps two of them under names of its own.
KEPT = {"dist_all_gather_func": ALL_GATHER, "dist_reduce_scatter_func": REDUCE_SCATTER}


class Asked(contextlib.ExitStack):
    """Record what Megatron and megalora ask of torch.distributed's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.sizes: Counter[Any] = Counter()
        self._inside = False
        self._watched: dict[Any, Any] = {}
        for owner in (dist, dist.distributed_c10d):
            for name, kind in FUNCTIONS.items():
                self._watch(owner, name, kind)
        for module in [m for name, m in sys.modules.items() if name.startswith("megatron.core.")]:
            for name, kind in KEPT.items():
                if name in vars(module):
                    self._watch(module, name, kind)

    def sent(self) -> Sent:
        """Return what was asked for, as `_sent` does."""
        return {key: (self.calls[key], self.sizes[key]) for key in self.calls}

    def _watch(self, owner: Any, name: str, kind: str) -> None:
        function = getattr(owner, name)
        # One for each: torch compares isend with the one that it is given.
        if function not in self._watched:
            self._watched[function] = self._recording(function, kind)
        self.enter_context(mock.patch.object(owner, name, self._watched[function]))

    def _recording(self, function: Any, kind: str) -> Any:
        given = inspect.signature(inspect.unwrap(function))

        def watched(*args: object, **kwargs: object) -> object:
            caller = sys._getframe(1).f_globals["__name__"]
            if not self._inside and not caller.startswith("tests."):
                self._record(kind, given.bind(*args, **kwargs).arguments)
            outside, self._inside = self._inside, True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = outside

        return watched

    def _record(self, kind: str, given: dict[str, Any]) -> None:
        group = given.get("group")
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        if kind in (SEND, RECEIVE):
            others = [given.get(name) for name in ("group_dst", "group_src")]
            other = next((ranks[n] for n in others if n is not None), None)
            other = given.get("dst", given.get("src")) if other is None else other
            ranks = tuple(sorted((dist.get_rank(), other)))
        sides = [[value] if isinstance(value, Tensor) else value for value in given.values()]
        tensors = [side for side in sides if isinstance(side, list)]
        key = kind, ranks
        if len(ranks) > 1:
            self.calls[key] += 1
            self.sizes[key] += max(sum(tensor.nbytes for tensor in side) for side in tensors)
