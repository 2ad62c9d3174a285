"""A step of fp16 that overflows on one rank is skipped on all, and training goes on as if without.

Stages that have nothing to train take part: their loss scale is the one that losses are scaled by.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import load_adapters
from tests.dist.support.cases import EP2, FP16, KINDS, PP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel
from tests.dist.support.models import build_model
from tests.dist.support.oracle import EPS
from tests.dist.support.parity import (
    LR,
    assemble,
    largest,
    lora_config,
    start_values,
    truth,
)
from tests.dist.support.training import Run, train
from tests.dist.test_parity import tolerance

NUM_STEPS, SKIPPED = 3, 1
CASES = [(TP2_SP, "dense"), (PP2, "dense"), (PP2, "unembedding alone")]


def overflow(chunks: list[Any], only: str) -> None:
    """Make one gradient of the last rank infinite, that of an adapter with `only` in its name.

    Where the gradient is one of all data-parallel ranks, on all of these.
    """
    is_shared = parallel_state.get_data_parallel_world_size() > 1 and only != "experts"
    if is_shared or dist.get_rank() == dist.get_world_size() - 1:
        adapter = [adapter for name, adapter in named_adapters(chunks) if only in name][-1]
        adapter.lora_B.main_grad.view(-1)[0] = float("inf")


def scales(chunks: list[Any]) -> list[float]:
    """Return by what each rank multiplies its loss."""
    own = float(chunks[0].config.grad_scale_func(torch.ones(1)))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return everywhere


@pytest.mark.world_2
@pytest.mark.parametrize(("layout", "kind"), CASES, ids=str)
def test_an_overflow_on_one_rank_is_skipped_on_all(layout: Layout, kind: str) -> None:
    _skips_one_step(layout, kind, "")


@pytest.mark.world_2
@pytest.mark.parametrize("only", ["experts", "linear_qkv"])
def test_dense_and_expert_adapters_skip_together(only: str) -> None:
    _skips_one_step(EP2, "experts", only)


@pytest.mark.world_2
def test_loss_scales_of_dense_and_expert_adapters_that_part_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_megatron_has_it: Any = ChainedOptimizer.prepare_grads
    monkeypatch.setattr(ChainedOptimizer, "prepare_grads", as_megatron_has_it.__wrapped__)
    with pytest.raises(AssertionError):
        _skips_one_step(EP2, "experts", "experts")


def _skips_one_step(layout: Layout, kind: str, only: str) -> None:
    expected = truth(layout.world_size, kind, torch.float16, None, (SKIPPED,), NUM_STEPS)
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS[kind].model, **FP16["fields"])
        load_adapters(apply_lora(chunks, lora_config(kind)), expected.start)

        def on_gradients(step: int) -> None:
            if step == SKIPPED:
                overflow(chunks, only)

        run = Run(
            loss_scale=2.0**13, num_steps=NUM_STEPS, lr=LR, adam_eps=EPS, on_gradients=on_gradients
        )
        history = train(chunks, layout, run)
        assert scales(chunks) == [2.0**12] * layout.world_size
        found = assemble(chunks, torch.Tensor.detach)
    assert history[:, 1].isinf().tolist() == [step == SKIPPED for step in range(NUM_STEPS)]
    assert largest(found, expected.end) < tolerance(torch.float16, "weights")


@pytest.mark.world_2
def test_a_scale_that_always_overflows_is_halved_and_changes_nothing() -> None:
    with model_parallel(TP2_SP):
        chunks = build_model(TP2_SP, **KINDS["dense"].model, **FP16["fields"])
        load_adapters(apply_lora(chunks, lora_config("dense")), start_values(chunks))
        before = assemble(chunks, torch.Tensor.clone)
        history = train(chunks, TP2_SP, Run(loss_scale=2.0**40, num_steps=2))
        assert scales(chunks) == [2.0**38] * 2
        after = assemble(chunks, torch.Tensor.clone)
    assert history[:, 1].isinf().all()
    assert all(torch.equal(after[name], before[name]) for name in before)
