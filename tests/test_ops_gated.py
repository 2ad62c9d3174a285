"""The ops of gated MLPs on the CPU against the reference, and that against autograd."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from megalora.ops import reference
from megalora.ops.fused import load
from tests.support.gated_cases import (
    Case,
    assert_gated_matches_reference,
    by_node,
    draw,
    leaves_of,
    merged,
    run_all,
    run_gate,
    split,
)
from tests.support.op_cases import TOLERANCE, relative_error

fused = load()
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

CASES = [
    Case(7, 12, 9, (3, 2)),
    Case(33, 20, 600, (4, 16)),  # more rows and columns than a tile has
    Case(65, 16, 513, (2, 3), splits=False, weighs=False),
    Case(40, 24, 1024, (1, 1), weighs=False),
    Case(20, 8, 40, (150, 140)),
    Case(1, 1, 1, (1, 1)),
    Case(0, 8, 4, (2, 2)),
]
GROUPED = [
    Case(90, 8, 20, (4, 3), ends=(20, 20, 85)),  # an expert without tokens, tokens without one
    Case(70, 8, 520, (2, 5), splits=False, weighs=False, ends=(1, 70)),
    Case(6, 8, 5, (1, 1), ends=(0, 0)),
    Case(0, 8, 5, (1, 1), ends=(0, 0)),
]
SHAPES = pytest.mark.parametrize("case", CASES, ids=str)


@DTYPES
@pytest.mark.parametrize("case", [*CASES, *GROUPED], ids=str)
def test_the_ops_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_gated_matches_reference(fused, draw(case, dtype))


@DTYPES
@SHAPES
def test_y_is_gate_and_up_and_those_of_the_reference_do_for_backward(
    case: Case, dtype: torch.dtype
) -> None:
    given = draw(case, dtype)
    how: Any = given.how()
    _, y, s1, s2 = reference.gated_mlp(given.x, *how)
    found = fused.gated_mlp(given.x, *how)[1]
    assert (found.shape, found.dtype) == (y.shape, y.dtype)
    assert relative_error(found, y) < TOLERANCE[dtype]
    both: Any = (given.dz, given.x, y, s1, s2, *how)
    gradients = [ops.gated_mlp_backward(*both) for ops in (fused, reference)]
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_gates_that_saturate_are_as_torch_has_them(spread: float, dtype: torch.dtype) -> None:
    given = draw(CASES[1], dtype, spread=spread)
    for got, expected in zip(run_all(fused, given), run_all(reference, given), strict=True):
        assert got.isfinite().all()
        assert relative_error(got, expected) < TOLERANCE[dtype]


def test_a_number_that_is_none_is_not_hidden() -> None:
    given = draw(CASES[0], torch.float32)
    given.x[2, 3] = float("nan")
    z = fused.gated_mlp(given.x, *given.how())[0]
    assert z[2].isnan().all()
    assert z[torch.arange(len(z)) != 2].isfinite().all()


@SHAPES
def test_every_gradient_is_that_of_the_merged_weights(case: Case) -> None:
    given = draw(case, torch.float64)
    leaves = leaves_of(given)
    results = [by_node(fused, given, *split(leaves)), merged(given, *split(leaves))]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(z, leaves, given.dz) for z in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", [CASES[0], Case(5, 4, 3, (2, 1), splits=False)], ids=str)
def test_the_node_passes_gradcheck(case: Case) -> None:
    given = draw(case, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: by_node(fused, given, *split([*leaves])), leaves_of(given)
    )


def test_gradcheck_notices_a_lost_low_rank_term(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = fused.gated_mlp_backward

    def without_a2(*arguments: Any) -> Any:
        before, lora_A2, behind = arguments[:10], arguments[10], arguments[11:]
        return right(*before, torch.zeros_like(lora_A2), *behind)

    monkeypatch.setattr(fused, "gated_mlp_backward", without_a2)
    with pytest.raises(GradcheckError):
        test_the_node_passes_gradcheck(CASES[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_opcheck_accepts_the_ops(case: Case) -> None:
    given = draw(case, torch.float32)
    ops = torch.ops.megalora
    made = reference.gated_mlp(given.x, *given.how())
    both = (given.dz, given.x, *made[1:], *given.how())
    sums = [factor.clone() for factor in given.factors]
    for op, arguments in {
        ops.gated_mlp: (given.x, *given.how()),
        ops.gated_mlp_backward: both,
        ops.gated_mlp_backward_: (*sums, *both),
    }.items():
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("case", [CASES[0], GROUPED[1]], ids=str)
def test_opcheck_accepts_the_ops_of_the_pass(case: Case) -> None:
    given = draw(case, torch.float32)
    (s1, ds2), how = given.thin, given.gate_how()
    torch.library.opcheck(torch.ops.megalora.gate_.default, (given.y.clone(), s1, *how))
    backward = (given.da.clone(), ds2, given.y, s1, *how)
    torch.library.opcheck(torch.ops.megalora.gate_backward_.default, backward)


def test_the_pass_takes_views_and_three_dimensions() -> None:
    given = draw(Case(12, 20, 40, (4, 3), weighs=False), torch.float32)
    expected = run_gate(reference, given)
    s1, ds2 = (torch.cat([thin, thin], -1)[:, : thin.shape[1]] for thin in given.thin)
    strided = dataclasses.replace(given, thin=(s1, ds2), da=given.da.t().contiguous().t())
    folded = dataclasses.replace(
        given,
        y=given.y.view(4, 3, -1),
        da=given.da.view(4, 3, -1),
        thin=(given.thin[0].view(4, 3, -1), given.thin[1].view(4, 3, -1)),
    )
    for other in (strided, folded):
        for got, right in zip(run_gate(fused, other), expected, strict=True):
            assert relative_error(got.reshape(right.shape), right) < TOLERANCE[torch.float32]


def test_views_and_three_dimensions_are_the_same() -> None:
    given = draw(Case(12, 20, 40, (4, 3), weighs=False), torch.float32)
    expected = run_all(reference, given)
    wide = torch.empty(12, 50)
    wide[:, 10:30] = given.x
    strided = dataclasses.replace(
        given, x=wide[:, 10:30], factors=[factor.t().contiguous().t() for factor in given.factors]
    )
    folded = dataclasses.replace(given, x=given.x.view(4, 3, 20), dz=given.dz.view(4, 3, 20))
    for other in (strided, folded):
        for got, right in zip(run_all(fused, other), expected, strict=True):
            assert relative_error(got.reshape(right.shape), right) < TOLERANCE[torch.float32]


GIVEN = draw(Case(4, 6, 5, (2, 2)), torch.float32)
MISUSES: dict[str, tuple[Any, str]] = {
    "dtype": (
        draw(Case(4, 6, 5, (2, 2)), torch.bfloat16),
        "dtype BFloat16, 5 columns of gate and rank 2 are not",
    ),
    "segments": (
        dataclasses.replace(GIVEN, segments=[4, 6]),
        r"segments is \[4, 6\], expected none or gate and up, \[5, 5\]",
    ),
    "weights": (
        dataclasses.replace(GIVEN, weights=torch.ones(3)),
        r"weights has shape \[3\], expected one for each of 4 tokens",
    ),
    "weights' dtype": (
        dataclasses.replace(GIVEN, weights=torch.ones(4).double()),
        "weights has dtype Double, expected that of x, Float",
    ),
    "columns": (
        dataclasses.replace(GIVEN, base=(torch.zeros(12, 6), GIVEN.base[1])),
        "lora_B's number of rows is 10, expected 12",
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_is_named(misuse: str) -> None:
    given, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        fused.gated_mlp(given.x, *given.how())


MISUSED_PASSES: dict[str, tuple[Any, str]] = {
    "y": (
        dataclasses.replace(GIVEN, y=torch.ones(10, 4).t()),
        "y has strides, expected a contiguous tensor",
    ),
    "s1": (
        dataclasses.replace(GIVEN, thin=(torch.ones(4, 3), GIVEN.thin[1])),
        "the last size of s or ds is 3, expected 4",
    ),
    "offsets": (
        dataclasses.replace(GIVEN, offsets=torch.tensor([3, 5])),
        r"offsets\[1\] is 5, expected 3 to 4",
    ),
}


@pytest.mark.parametrize("misuse", MISUSED_PASSES)
def test_a_misuse_of_the_pass_is_named(misuse: str) -> None:
    given, message = MISUSED_PASSES[misuse]
    with pytest.raises(ValueError, match=message):
        fused.gate_(given.y, given.thin[0], *given.gate_how())


def test_a_gradient_of_other_columns_is_named() -> None:
    how = (GIVEN.y, GIVEN.thin[0], *GIVEN.gate_how())
    message = "the last size of da is 4, expected 5, lora_A2's last size"
    with pytest.raises(ValueError, match=message):
        fused.gate_backward_(torch.ones(4, 4), GIVEN.thin[1], *how)
