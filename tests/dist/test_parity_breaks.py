"""Negative controls: each broken rule of the sharding contract is noticed by the matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.moe import router

import megalora.adapters.adapter
import megalora.adapters.factors
import megalora.adapters.sandwich
import megalora.data.batch
from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split, State
from megalora.adapters.collectives import Collective, GatherFactor, group_size, own_shard
from megalora.adapters.opened import OpenedLinear
from megalora.adapters.routes import ROUTES, ShardUse
from megalora.targets import Rows
from tests.dist.support.answers import Answers
from tests.dist.support.cases import (
    BF16,
    BY_MICROBATCH,
    BY_TOKEN,
    CP2,
    EP2,
    ETP2,
    FP16,
    OVERLAPPED,
    TP2,
    TP2_SP,
    Case,
)
from tests.dist.support.layouts import Layout
from tests.dist.support.parity import errors, truth
from tests.dist.support.training import Run
from tests.dist.test_parity import in_its_world, tolerance

Break = Callable[[pytest.MonkeyPatch], None]


def route(split: Split, state: State, **broken: Any) -> Break:
    changed = dataclasses.replace(ROUTES[split, state], **broken)
    return lambda patch: patch.setitem(ROUTES, (split, state), changed)


def one_sum_missing(patch: pytest.MonkeyPatch) -> None:
    right = LoRAAdapter.route

    def wrong(self: LoRAAdapter, state: State) -> Any:
        broken = self.spec.name == "decoder.layers.0.mlp.linear_fc1"
        route = right(self, state)
        return dataclasses.replace(route, backward=Collective.NONE) if broken else route

    patch.setattr(LoRAAdapter, "route", wrong)


def slice_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    def wrong(full: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        size = group_size(group)
        return full if size == 1 else full.chunk(size, dim)[(group.rank() + 1) % size]

    patch.setattr(megalora.adapters.sandwich, "own_shard", wrong)


def swapped_segments(patch: pytest.MonkeyPatch) -> None:
    right = Rows.segments

    def wrong(self: Rows, tp_rank: int, tp_size: int) -> list[int]:
        return right(dataclasses.replace(self, period=self.period[::-1]), tp_rank, tp_size)

    patch.setattr(Rows, "segments", wrong)


def scale_off_by_a_thousandth(patch: pytest.MonkeyPatch) -> None:
    right = megalora.config.LoRAConfig.scale
    patch.setattr(megalora.config.LoRAConfig, "scale", lambda self, rank: 1.001 * right(self, rank))


def opened_base_without_the_rest_of_dx(patch: pytest.MonkeyPatch) -> None:
    right = OpenedLinear.backward

    def wrong(ctx: Any, dy: torch.Tensor) -> Any:
        _, weight, *_ = ctx.saved_tensors
        dx, *rest = right(ctx, dy)
        return dx if dx is None else dy @ weight, *rest

    patch.setattr(OpenedLinear, "backward", staticmethod(wrong))


def gradient_of_a_gathered_factor_not_summed(patch: pytest.MonkeyPatch) -> None:
    def wrong(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return own_shard(grad, ctx.dim, ctx.group).contiguous(), None, None

    patch.setattr(GatherFactor, "backward", staticmethod(wrong))


def experts_reduced_like_dense_layers(patch: pytest.MonkeyPatch) -> None:
    _reduce(patch, lambda adapter: True)


def shared_factors_reduced_like_experts(patch: pytest.MonkeyPatch) -> None:
    _reduce(patch, lambda adapter: not adapter.base.is_expert)


def _reduce(patch: pytest.MonkeyPatch, like_dense: Callable[[LoRAAdapter], bool]) -> None:
    right = LoRAAdapter._parameter

    def wrong(self: LoRAAdapter, *args: Any) -> torch.nn.Parameter:
        param = right(self, *args)
        param.allreduce = like_dense(self)  # type: ignore[attr-defined]
        return param

    patch.setattr(LoRAAdapter, "_parameter", wrong)


def shards_counted_as_replicas(patch: pytest.MonkeyPatch) -> None:
    right = LoRAAdapter._parameter

    def wrong(self: LoRAAdapter, *args: Any) -> torch.nn.Parameter:
        param = right(self, *args)
        param.tensor_model_parallel = False  # type: ignore[attr-defined]
        return param

    patch.setattr(LoRAAdapter, "_parameter", wrong)


def start_drawn_from_local_sizes(patch: pytest.MonkeyPatch) -> None:
    right = megalora.adapters.adapter.start_values

    def wrong(*args: Any) -> torch.Tensor | float:
        return right(*args) * 2**0.5

    patch.setattr(megalora.adapters.adapter, "start_values", wrong)


def adapters_called_without_their_hooks(patch: pytest.MonkeyPatch) -> None:
    def call(self: LoRAAdapter, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    patch.setattr(LoRAAdapter, "__call__", call)


def parts_of_an_in_proj_taken_for_a_slice(patch: pytest.MonkeyPatch) -> None:
    right = megalora.adapters.factors.to_ranks

    def wrong(whole: torch.Tensor, rows: Rows, tp_size: int, dim: int) -> torch.Tensor:
        return whole if rows.names else right(whole, rows, tp_size, dim)

    patch.setattr(megalora.adapters.factors, "to_ranks", wrong)


def gate_and_up_taken_for_a_slice(patch: pytest.MonkeyPatch) -> None:
    right = megalora.adapters.factors.to_ranks

    def wrong(whole: torch.Tensor, rows: Rows, tp_size: int, dim: int) -> torch.Tensor:
        return right(whole, rows, tp_size, dim) if rows.names else whole

    patch.setattr(megalora.adapters.factors, "to_ranks", wrong)


def answers_counted_on_each_rank(patch: pytest.MonkeyPatch) -> None:
    right = megalora.data.batch.loss_func

    def wrong(loss_mask: torch.Tensor, _num_tokens: Any, losses: torch.Tensor) -> Any:
        return right(loss_mask, loss_mask.sum(), losses)

    patch.setattr(megalora.data.batch, "loss_func", wrong)


def _answers(kind: str, answers: Answers, note: str) -> Case:
    return Case(layout=CP2, kind=kind, note=note, run=Run(answers=answers))


def as_megatron_has_it(module: Any, name: str) -> Break:
    return lambda patch: patch.setattr(module, name, getattr(module, name).__wrapped__)


BREAKS: list[tuple[Case, str, Break]] = [
    (
        Case(layout=TP2, note="no all-reduce of ds"),
        "gradient",
        route(Split.COLUMN, State.REPLICATED, backward=Collective.NONE),
    ),
    (
        Case(layout=TP2, note="no all-reduce of s"),
        "loss",
        route(Split.ROW, State.REPLICATED, forward=Collective.NONE),
    ),
    (
        Case(layout=TP2_SP, note="dA sliced, not summed"),
        "gradient",
        route(Split.COLUMN, State.TOKEN_SHARD, a=ShardUse.SLICED),
    ),
    (
        Case(layout=Layout(), note="an opened base without ds A"),
        "gradient",
        opened_base_without_the_rest_of_dx,
    ),
    (Case(layout=TP2, note="another rank's slice"), "gradient", slice_of_another_rank),
    *(
        (
            Case(layout=TP2, **{**half, "note": f"no all-reduce of ds in one linear, {note}"}),
            "gradient",
            one_sum_missing,
        )
        for half, note in ((BF16, "bf16"), (FP16, "fp16"))
    ),
    (Case(layout=TP2_SP, note="segments swapped"), "gradient", swapped_segments),
    (Case(layout=TP2_SP, note="scale off by 0.1 %"), "gradient", scale_off_by_a_thousandth),
    (Case(layout=TP2, note="shards taken for replicas"), "norm", shards_counted_as_replicas),
    (Case(layout=TP2, note="start of local sizes"), "start", start_drawn_from_local_sizes),
    (
        Case(layout=TP2_SP, kind="hybrid", note="parts taken for a slice"),
        "loss",
        parts_of_an_in_proj_taken_for_a_slice,
    ),
    (
        Case(layout=TP2_SP, note="gate and up taken for a slice"),
        "loss",
        gate_and_up_taken_for_a_slice,
    ),
    (
        # Megatron gathers a module's parameters in a hook before its call.
        Case(layout=Layout(dp=2), **{**OVERLAPPED, "note": "no hooks before adapters"}),
        "weights",
        adapters_called_without_their_hooks,
    ),
    (
        Case(layout=ETP2, kind="experts", note="gathered factor not summed"),
        "gradient",
        gradient_of_a_gathered_factor_not_summed,
    ),
    (
        Case(layout=EP2, kind="experts", note="experts reduced as dense"),
        "gradient",
        experts_reduced_like_dense_layers,
    ),
    (
        Case(layout=EP2, kind="shared-outer experts", note="shared factors reduced as experts"),
        "gradient",
        shared_factors_reduced_like_experts,
    ),
    (
        _answers("dense", BY_MICROBATCH, "counted on each rank"),
        "gradient",
        answers_counted_on_each_rank,
    ),
    *(
        (
            _answers("2 predicted tokens more", answers, f"counted on each rank, {answers}"),
            "gradient",
            as_megatron_has_it(gpt_model, "process_mtp_loss"),
        )
        for answers in (BY_TOKEN, BY_MICROBATCH)
    ),
    (
        _answers("balanced experts", BY_MICROBATCH, "z-loss of each rank"),
        "gradient",
        as_megatron_has_it(router.TopKRouter, "apply_z_loss"),
    ),
    (
        _answers("balanced experts", BY_TOKEN, "balanced by all tokens of each rank"),
        "gradient",
        as_megatron_has_it(router, "get_tokens_per_expert_and_token_count"),
    ),
]


@pytest.mark.parametrize(
    ("case", "what", "break_it"),
    [pytest.param(*row, id=str(row[0]), marks=in_its_world(row[0]).marks) for row in BREAKS],
)
def test_a_broken_rule_is_noticed(
    case: Case, what: str, break_it: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Unbroken, and kept.
    truth(case.layout.world_size, case.kind, case.dtype, case.run.answers)
    break_it(monkeypatch)
    try:
        error = errors(case)[what]
    except AssertionError as replicas:
        # Ranks that hold the same numbers by contract no longer do.
        if "differ" not in str(replicas) and "not close" not in str(replicas):
            raise
    else:
        margin = 10 if case.dtype == torch.float32 else 2
        assert error > margin * tolerance(case.dtype, what)
