"""Hold ops in bf16 to the reference in float64, on the device of their tensors."""

import dataclasses
import re
from collections.abc import Callable

import torch
from torch import Tensor

from megalora.ops import reference
from megalora.ops.fused import load
from megalora.ops.protocol import Ops
from tests.support.op_cases import TOLERANCE, Problem, relative_error

NORM_TOLERANCE = 4e-3  # one rounding to bf16 is 1.7e-3


def in_doubles(given: Problem) -> Problem:
    """Return the same problem with its numbers in float64."""
    tensors = {
        name: value.double()
        for name, value in vars(given).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(given, **tensors)


def assert_close(got: Tensor, expected: Tensor, name: str) -> None:
    """Hold the largest difference, which one wrong element shows, and the norm, which all do."""
    assert relative_error(got, expected) < TOLERANCE[torch.bfloat16], name
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference.item() < NORM_TOLERANCE, name


def assert_right(run: Callable[[Ops, Problem], dict[str, Tensor]], given: Problem) -> None:
    """Compare the compiled ops' results, and what they add to, with float64."""
    expected = run(reference, in_doubles(given))
    for name, got in run(load(), given).items():
        assert_close(got, expected[re.sub(r"torch\.\w+", "torch.float64", name)], name)


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Hold results to others of the same names, bit for bit."""
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
