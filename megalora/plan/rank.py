"""One rank of a plan: built, run for a step on shapes alone, and read."""

from dataclasses import dataclass

from megatron.core import parallel_state

from megalora.plan.contract import LinearTraffic, contract
from megalora.plan.flags import notes
from megalora.plan.memory import Memory, memory
from megalora.plan.meter import Meter
from megalora.plan.phases import Step
from megalora.plan.script import Built
from megalora.plan.step import run_step
from megalora.plan.traffic import Traffic, traffic
from megalora.plan.work import Work, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands in each kind of group."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What one rank holds, sends and computes.

    contract: what its adapters send, of `traffic`, linear by linear. notes: in sentences, what its
    activations are made of, and what they leave out.
    """

    rank: int
    place: Place
    memory: Memory
    traffic: list[Traffic]
    contract: list[LinearTraffic]
    work: Work
    step: Step
    notes: list[str]


def read_rank(rank: int, built: Built, *, gpus_per_node: int) -> RankPlan:
    """Run a step of what a rank has built, and read what it took."""
    args, meter = built.args, Meter()
    step = run_step(built.model, built.optimizer, args, meter)
    return RankPlan(
        rank=rank,
        place=_place(),
        memory=memory(built, step),
        traffic=traffic(meter, step, gpus_per_node=gpus_per_node),
        contract=contract(
            built.model,
            tokens=args.micro_batch_size * args.seq_length // args.context_parallel_size,
            predictions=1 + (args.mtp_num_layers or 0),
        ),
        work=work(meter, step),
        step=step,
        notes=notes(args),
    )


def _place() -> Place:
    return Place(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
    )
