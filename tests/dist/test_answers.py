"""Answers only: the rows of the matrix leave ranks without any, a batch may have none at all."""

import itertools

import pytest
import torch

from megalora.builder import apply_lora
from megalora.checkpoint.state import load_adapters
from tests.dist.support import answers
from tests.dist.support.answers import Answers
from tests.dist.support.cases import BY_MICROBATCH, BY_TOKEN, CP2, KINDS
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import assemble, lora_config, objective, start_values
from tests.dist.support.training import Run, context_parallel_cut, train


@over(CP2)
def test_the_rows_leave_either_rank_and_a_microbatch_without_a_trained_token(
    layout: Layout,
) -> None:
    microbatches = itertools.chain(*(BY_MICROBATCH.microbatches(step) for step in range(5)))
    masks = torch.cat([microbatch.loss_mask for microbatch in microbatches])
    with model_parallel(layout):
        own = masks[:, context_parallel_cut(layout, Run())].sum(1)
    other = masks.sum(1) - own
    assert ((own == 0) & (other > 0)).any()
    assert ((own > 0) & (other == 0)).any()
    assert ((own == 0) & (other == 0)).any()
    assert ((own > 0) & (other > 0) & (own != other)).any()


@pytest.mark.parametrize("rows", [BY_TOKEN, BY_MICROBATCH], ids=str)
@over(CP2)
def test_a_batch_without_a_trained_token_has_loss_zero_and_changes_nothing(
    layout: Layout, rows: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "PADDED", [(16, ()), (9, ())])
    run = Run(answers=Answers(per_token=rows.per_token), num_steps=2)
    kind = "2 predicted tokens more"
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS[kind].model, **objective(run.answers))
        load_adapters(apply_lora(chunks, lora_config(kind)), start_values(chunks))
        before = assemble(chunks, torch.Tensor.clone)
        assert not train(chunks, layout, run).any()
        after = assemble(chunks, torch.Tensor.clone)
    assert all(torch.equal(after[name], before[name]) for name in before)
