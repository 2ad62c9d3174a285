"""One training step of a rank, by Megatron's own schedule and optimizer, on shapes alone."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from megalora.plan.assumed import assumptions
from megalora.plan.gpu import keep_stand_ins
from megalora.plan.holdings import held
from megalora.plan.meter import Meter
from megalora.plan.phases import FINISH, MICROBATCH, UPDATE, Step


def run_step(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    args: argparse.Namespace,
    meter: Meter,
) -> Step:
    """Run a step, of as few microbatches as show what all of them do.

    An update before it, which is not counted, makes the optimizer's states.
    """
    _prepare(model, optimizer, args, meter)
    wanted = get_num_microbatches()
    meter.hold([one.tensor for one in held(model, optimizer)])
    with assumptions(), meter:
        _zero_gradients(model, optimizer)
        optimizer.step()
        keep_stand_ins(model)
        runs = [
            _forward_backward(model, optimizer, args, meter, run) for run in _runs(args, wanted)
        ]
        with meter.during(UPDATE):
            optimizer.step()
    last = runs[-1]
    return Step(
        microbatches=last.microbatches,
        all_microbatches=wanted,
        before=runs[0].before,
        peak=_peak(runs, _most_in_flight(wanted)),
    )


class _Run(NamedTuple):
    """A run of the schedule.

    in_flight: how many microbatches are forward and not yet backward, at most; None where the
    schedule is left alone. peak: bytes; both of these are known once it has run.
    """

    microbatches: int
    in_flight: int | None
    before: int = 0
    peak: int = 0


def _most_in_flight(wanted: int) -> int:
    """Return how many microbatches a stage holds at once in 1F1B: as many as stages follow, and it.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters".
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return min(wanted, stages - parallel_state.get_pipeline_model_parallel_rank())


def _runs(args: argparse.Namespace, wanted: int) -> list[_Run]:
    """Return the runs that show what a step holds.

    Each microbatch in flight holds as much as another. So where many are, runs of two and of three
    say what all hold; an interleaved schedule, whose chunks differ, runs until it is full.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    in_flight = _most_in_flight(wanted)
    if args.virtual_pipeline_model_parallel_size is not None:
        # Megatron takes them in groups of as many as there are stages.
        return [_Run(min(wanted, 2 * stages), None)]
    if in_flight <= _SHOWN[-1]:
        return [_Run(min(wanted, in_flight + 1), None)]
    # One more comes in before the first of them is done, where there is one more.
    more = int(wanted > in_flight)
    return [_Run(few + more, few) for few in _SHOWN]


_SHOWN = (2, 3)


def _peak(runs: Sequence[_Run], in_flight: int) -> int:
    """Return the peak with so many microbatches in flight, of what runs with fewer had."""
    last = runs[-1]
    if last.in_flight is None:
        return last.peak
    (few, most), (low, high) = _SHOWN, (run.peak for run in runs)
    return high + (high - low) // (most - few) * (in_flight - most)


def _zero_gradients(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    for chunk in model:
        ddp: Any = chunk
        ddp.zero_grad_buffer()
    optimizer.zero_grad()


def _prepare(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    args: argparse.Namespace,
    meter: Meter,
) -> None:
    """Set what `megatron.training.training.train` sets before its first step."""
    config: Any = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.timers = None
    if args.overlap_grad_reduce:
        config.no_sync_func = _each(model, "no_sync")
        if args.align_grad_reduce:
            config.grad_sync_func = _each(model, "start_grad_sync")
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = _each(model, "start_param_sync")

    def finish(*args: object, **kwargs: object) -> None:
        with meter.during(FINISH):
            finalize_model_grads(*args, **kwargs)  # type: ignore[arg-type]

    config.finalize_model_grads_func = finish
    for chunk in model:
        # They look at numbers.
        ddp: Any = chunk
        ddp.ddp_config.check_for_nan_in_grad = False
        ddp.ddp_config.check_for_large_grads = False


def _each(model: Sequence[torch.nn.Module], name: str) -> object:
    methods = [getattr(chunk, name) for chunk in model]
    return methods if len(methods) > 1 else methods[0]


def _forward_backward(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    args: argparse.Namespace,
    meter: Meter,
    run: _Run,
) -> _Run:
    """Run Megatron's schedule; return the run with what it held. Counting starts anew."""
    several = len(model) > 1
    no_data: Any = [None] * len(model) if several else None
    meter.restart()
    _zero_gradients(model, optimizer)
    before = meter.live
    with meter.during(MICROBATCH), _as_if_followed(run.in_flight):
        get_forward_backward_func()(
            forward_step_func=_forward_step(args),
            data_iterator=no_data,
            model=list(model) if several else model[0],
            num_microbatches=run.microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
    return run._replace(before=before, peak=meter.peak)


def _as_if_followed(in_flight: int | None) -> AbstractContextManager[object]:
    """Let a stage be followed by so few that it has no more microbatches in flight than these."""
    if in_flight is None:
        return nullcontext()

    def total_stages(self: P2PCommunicator) -> int:
        return self.current_stage + in_flight

    return mock.patch.object(P2PCommunicator, "total_stages", property(total_stages))


def _forward_step(
    args: argparse.Namespace,
) -> Callable[..., tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]]:
    shape = args.micro_batch_size, args.seq_length // args.context_parallel_size

    def forward_step(
        data_iterator: object, chunk: torch.nn.Module, return_schedule_plan: bool = False
    ) -> Any:
        tokens = torch.zeros(shape, dtype=torch.long, device="cuda")
        # --overlap-moe-expert-parallel-comm runs a chunk in pieces.
        planned: Any = chunk
        run = planned.build_schedule_plan if return_schedule_plan else chunk
        return run(tokens, tokens, None, labels=tokens), loss_func

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.float().sum()
        return total, torch.ones((), dtype=torch.int, device="cuda"), {}

    return forward_step
