"""Which ranks of a world differ, and in what.

Tensor, context, expert and data-parallel ranks of one pipeline stage hold tensors of the same
shapes: Megatron and the adapters cut every dimension into equal parts or refuse to. What is left is
the stage, and of the distributed optimizer the shard, which need not be as full as another.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.parallel_state import RankGenerator

from megalora.plan.holdings import dense_buffers, expert_buffers

_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """Ranks of one pipeline stage: one plan is all of theirs but for the optimizer's shards.

    rank: the one to plan, the lowest. count: how many there are. first: the lowest few. rule: which
    ones they are, for people.
    """

    stage: int
    rank: int
    count: int
    first: tuple[int, ...]
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a rank stands: its stage, and its place among the copies of dense and expert weights.

    dense: of all data and context-parallel ranks. expert: of all expert-data-parallel ones.
    """

    stage: int
    dense: int
    expert: int


def positions(args: argparse.Namespace) -> list[Position]:
    """Return where every rank of a world stands, by Megatron's parsed arguments."""
    dense, expert = _generators(args)
    stage, copy = (_index(dense, token) for token in ("pp", "dp-cp"))
    expert_copy = _index(expert, "dp")
    return [
        Position(stage=stage[rank], dense=copy[rank], expert=expert_copy[rank])
        for rank in range(args.world_size)
    ]


def alike(args: argparse.Namespace) -> list[Alike]:
    """Return the ranks that differ, one entry for each pipeline stage, by parsed arguments."""
    by_stage: dict[int, list[int]] = {}
    for rank, position in enumerate(positions(args)):
        by_stage.setdefault(position.stage, []).append(rank)
    return [
        Alike(
            stage=stage,
            rank=ranks[0],
            count=len(ranks),
            first=tuple(ranks[:_SHOWN]),
            rule=f"pipeline stage {stage} of {len(by_stage)}, {_rule(ranks)}",
        )
        for stage, ranks in sorted(by_stage.items())
    ]


def shard_sizes(buffer: _ParamAndGradBuffer) -> list[int]:
    """Return how many parameters' elements each data-parallel rank's shard of a buffer has.

    A bucket is cut into as many equal parts as there are ranks; its padding is nobody's.
    """
    size = buffer.data_parallel_group.size()
    found = [0] * size
    for start, end, bucket in buffer.param_index_map.values():
        first, last = buffer.bucket_indices[bucket]
        part = (last - first) // size
        for rank in range((start - first) // part, (end - first - 1) // part + 1):
            begin = first + rank * part
            found[rank] += min(end, begin + part) - max(start, begin)
    return found


def shards_by_rank(
    model: Sequence[torch.nn.Module], args: argparse.Namespace, stage: int
) -> dict[int, dict[torch.dtype, int]]:
    """Return, for each rank of a stage, how many elements of each type its optimizer updates.

    model: that of any rank of this stage, as the distributed optimizer's DDP has wrapped it.
    """
    kinds = [(dense_buffers(model), "dense"), (expert_buffers(model), "expert")]
    sizes = [
        (buffer.param_dtype, shard_sizes(buffer), place)
        for buffers, place in kinds
        for buffer in buffers
    ]
    found: dict[int, dict[torch.dtype, int]] = {}
    for rank, position in enumerate(positions(args)):
        if position.stage == stage:
            own = found[rank] = {}
            for dtype, elements, place in sizes:
                # Of several optimizer instances each shards over neighbours.
                number = getattr(position, place) % len(elements)
                own[dtype] = own.get(dtype, 0) + elements[number]
    return found


def _generators(args: argparse.Namespace) -> tuple[RankGenerator, RankGenerator]:
    """Return Megatron's arithmetic of ranks, for dense layers and for experts."""
    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    common: dict[str, Any] = {"pp": pp, "order": order}
    dense = RankGenerator(tp=tp, ep=1, dp=args.world_size // (tp * pp * cp), cp=cp, **common)
    expert = RankGenerator(tp=etp, ep=ep, dp=args.world_size // (etp * ep * pp), cp=1, **common)
    return dense, expert


def _index(generator: RankGenerator, token: str) -> list[int]:
    """Return each rank's place in its group."""
    found = [0] * generator.world_size
    for group in generator.get_ranks(token):
        for place, rank in enumerate(group):
            found[rank] = place
    return found


def _rule(ranks: Sequence[int]) -> str:
    """Say which ranks these are: they come in runs of one length at one distance."""
    length = next((n for n, (a, b) in enumerate(pairwise(ranks), 1) if b != a + 1), len(ranks))
    if length == len(ranks):
        return f"ranks {ranks[0]} to {ranks[-1]}" if length > 1 else f"rank {ranks[0]}"
    step = ranks[length] - ranks[0]
    return f"{length} ranks from {ranks[0]} on, and so every {step} ranks"
