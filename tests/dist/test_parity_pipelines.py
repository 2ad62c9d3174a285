"""Stages of a pipeline that are not alike train as one stage alone."""

from typing import Any

import pytest

from tests.dist.support.cases import Case
from tests.dist.support.layouts import Layout, over
from tests.dist.support.parity import errors


@pytest.mark.parametrize(
    "fields",
    [
        {"pipeline_model_parallel_layout": "Et|tttL"},
        {"pipeline_model_parallel_layout": "E|ttttL"},
        {"num_layers_in_first_pipeline_stage": 3},
        {"num_layers_in_last_pipeline_stage": 3},
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ],
    ids=str,
)
@over(Layout(pp=2))
def test_unlike_stages_train_as_one(layout: Layout, fields: dict[str, Any]) -> None:
    found = errors(Case(layout=layout, kind="dense of 4 layers", fields=fields))
    assert max(found.values()) < 1e-5, found


@over(Layout(pp=2, vpp=2))
def test_virtual_stages_of_a_layout_train_as_one(layout: Layout) -> None:
    fields = {"pipeline_model_parallel_layout": "Ett|t||tL"}
    found = errors(Case(layout=layout, kind="dense of 4 layers", fields=fields))
    assert max(found.values()) < 1e-5, found
