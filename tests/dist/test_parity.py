"""Every layout trains the adapters that one unsharded rank would, and a broken rule is noticed."""

from typing import Any

import pytest
import torch

from tests.dist.cases import CASES, Case
from tests.dist.parity import errors

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def in_its_world(case: Case) -> Any:
    mark = getattr(pytest.mark, f"world_{case.layout.world_size}")
    return pytest.param(case, id=str(case), marks=mark)


@pytest.mark.parametrize("case", map(in_its_world, CASES))
def test_adapters_train_as_in_the_unsharded_model(case: Case) -> None:
    found = errors(case)
    assert found["start"] == 0.0
    too_large = {what: error for what, error in found.items() if error > TOLERANCE[case.dtype]}
    assert not too_large
