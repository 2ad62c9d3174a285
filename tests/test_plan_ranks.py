"""Which ranks of a world differ, by arithmetic alone: as Megatron's own groups have it."""

import argparse
from typing import Any

import pytest

from tests.support import forked
from tests.support.plans import EXPERTS, in_a_world, planned

WORLDS: dict[str, dict[str, Any]] = {
    "stages last": {"world_size": 64, "tp": 2, "pp": 4, "cp": 2, "ep": 4, "etp": 1},
    "stages before copies": {"world_size": 64, "tp": 2, "pp": 4, "tp_pp_dp": True},
    "one stage": {"world_size": 16, "tp": 4, "ep": 2, "etp": 2},
}


def args_of(
    world_size: int, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, **more: Any
) -> argparse.Namespace:
    return argparse.Namespace(
        world_size=world_size,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=more.get("etp"),
        use_tp_pp_dp_mapping=more.get("tp_pp_dp", False),
    )


def stands(rank: int, world: dict[str, Any]) -> tuple[Any, Any]:
    """Return where a rank stands by this arithmetic, and by Megatron's groups."""
    import torch.distributed as dist

    from megalora.plan.ranks import Position, positions

    args = args_of(**world)
    with in_a_world(rank, args.world_size):
        dist.init_process_group("nccl")
        from megatron.core import parallel_state as state

        state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        )
        own = Position(
            stage=state.get_pipeline_model_parallel_rank(),
            dense=state.get_data_parallel_rank(with_context_parallel=True),
            expert=state.get_expert_data_parallel_rank(),
        )
    return positions(args)[rank], own


@pytest.mark.parametrize("name", WORLDS)
def test_a_rank_stands_where_megatrons_groups_have_it(name: str) -> None:
    told, own = forked.call(stands, 11, WORLDS[name])
    assert told == own
    assert own.dense or own.expert


def stages(world: dict[str, Any]) -> Any:
    from dataclasses import asdict

    from megalora.plan.ranks import alike

    return [asdict(one) for one in alike(args_of(**world))]


def test_ranks_that_are_alike_are_named_by_a_rule() -> None:
    last, before, one = (forked.call(stages, world) for world in WORLDS.values())
    assert [stage["rank"] for stage in last] == [0, 16, 32, 48]
    assert last[1]["rule"] == "pipeline stage 1 of 4, ranks 16 to 31"
    assert [stage["first"] for stage in before] == [(n, n + 1, n + 8, n + 9) for n in (0, 2, 4, 6)]
    assert {stage["count"] for stage in (*last, *before, *one)} == {16}
    assert before[2]["rule"] == "pipeline stage 2 of 4, 2 ranks from 4 on, and so every 8 ranks"


SHARDED = (
    *EXPERTS,
    *("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
    *("--overlap-grad-reduce", "--ddp-bucket-size", "3000"),
    *("--global-batch-size", "16", "--lora-rank", "3", "--lora-expert-rank", "1"),
)


def test_every_rank_knows_the_optimizer_of_the_fullest() -> None:
    """In several buckets, with experts that have half as many copies."""
    plans = {rank: planned(rank, 16, *SHARDED).memory for rank in (0, 15)}
    told = {(m.optimizer_least, m.optimizer_most, m.fullest_rank) for m in plans.values()}
    (least, most, fullest) = next(iter(told))
    assert told == {(least, most, fullest)}
    assert least < most
    plans[fullest] = planned(fullest, 16, *SHARDED).memory
    assert plans[fullest].optimizer == most
    assert all(least <= memory.optimizer <= most for memory in plans.values())
