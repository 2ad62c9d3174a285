"""Random tensors of gated MLPs, and what the ops make of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalora.adapters.call import Call
from megalora.adapters.gated import OpenedGatedMLP
from megalora.adapters.node import apply
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.ops import Ops, reference
from tests.support.op_cases import TOLERANCE, relative_error


@dataclass(frozen=True)
class Case:
    """Sizes of one gated MLP: columns of gate, and whether gate and up have an A each."""

    tokens: int
    features: int
    columns: int
    ranks: tuple[int, int]
    splits: bool = True
    weighs: bool = True
    weights_are_fp32: bool = False
    ends: tuple[int, ...] = ()  # of each expert's tokens, for the pass alone


# What the kernels of a GPU have to get right, small.
KERNEL_CASES = [
    Case(70, 24, 72, (3, 5)),  # words of two odd ranks; a tile of eight columns
    Case(16, 8, 64, (16, 16), splits=False, weighs=False),
    Case(40, 8, 1032, (4, 2), weights_are_fp32=True),  # groups of several tiles
    Case(130, 16, 200, (32, 20), weights_are_fp32=True),
    Case(9, 16, 328, (2, 30), splits=False),
    Case(90, 8, 136, (4, 3), ends=(20, 20, 85)),  # an expert without tokens, tokens without one
    Case(300, 8, 72, (2, 20), splits=False, weighs=False, ends=(290, 300)),
]


@dataclass(frozen=True)
class Given:
    """Random tensors of one case, and what the ops take behind them."""

    x: Tensor
    dz: Tensor
    factors: list[Tensor]
    base: tuple[Tensor, Tensor]
    weights: Tensor | None
    segments: list[int]
    y: Tensor
    da: Tensor
    thin: tuple[Tensor, Tensor]
    offsets: Tensor | None

    def how(self) -> tuple[Any, ...]:
        """Return what the ops with the bases take behind the tokens."""
        (a1, b1, a2, b2), (w1, w2) = self.factors, self.base
        return (w1, a1, b1, 0.5, w2, a2, b2, 0.3, self.segments, self.weights)

    def gate_how(self) -> tuple[Any, ...]:
        """Return what the ops of the pass alone take behind s1: factors of each expert."""
        _, b1, a2, _ = self.factors
        if self.offsets is not None:
            # Each expert's own: the rows of b1 and of a2 in another order.
            b1, a2 = (
                torch.stack([factor.roll(e, 0) for e in range(len(self.offsets))])
                for factor in (b1, a2)
            )
        return (b1, 0.5, a2, self.offsets, self.segments, self.weights)


def draw(case: Case, dtype: torch.dtype, *, spread: float = 1.0) -> Given:
    """Return random tensors of a case; spread: how large gates become."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / shape[-1] ** 0.5).to(dtype)

    (r1, r2), features, columns = case.ranks, case.features, case.columns
    weights = torch.rand(case.tokens, generator=generator)
    weights = weights if case.weights_are_fp32 else weights.to(dtype)
    return Given(
        x=spread * features**0.5 * normal(case.tokens, features),
        dz=features**0.5 * normal(case.tokens, features),
        factors=[
            normal((1 + case.splits) * r1, features),
            normal(2 * columns, r1),
            normal(r2, columns),
            normal(features, r2),
        ],
        base=(normal(2 * columns, features), normal(features, columns)),
        weights=weights if case.weighs else None,
        segments=[columns, columns] if case.splits else [],
        y=spread * columns**0.5 * normal(case.tokens, 2 * columns),
        da=columns**0.5 * normal(case.tokens, columns),
        thin=(normal(case.tokens, (1 + case.splits) * r1), normal(case.tokens, r2)),
        offsets=torch.tensor(case.ends) if case.ends else None,
    )


def moved(given: Given, *how: Any) -> Given:
    """Return the same on another device, or in another precision."""

    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        is_moved = isinstance(value, Tensor) and (value.is_floating_point() or "cuda" in how)
        return value.to(*how) if is_moved else value

    return Given(**{name: move(value) for name, value in vars(given).items()})


def run_all(ops: Ops, given: Given) -> list[Tensor]:
    """Return the results of both passes, and of the sums that are added to, but not y."""
    how: Any = given.how()
    z, y, s1, s2 = ops.gated_mlp(given.x, *how)
    both: Any = (given.dz, given.x, y, s1, s2, *how)
    gradients = ops.gated_mlp_backward(*both)
    sums: Any = [factor.clone() for factor in given.factors]
    return [z, s1, s2, *gradients, *ops.gated_mlp_backward_(*sums, *both), *sums]


def run_gate(ops: Ops, given: Given) -> list[Tensor]:
    """Return the results of both passes between closed bases."""
    how, (s1, ds2), y = given.gate_how(), given.thin, given.y.clone()
    forward = ops.gate_(y, s1, *how)
    return [*forward, *ops.gate_backward_(given.da.clone(), ds2, y, s1, *how)]


def assert_gated_matches_reference(ops: Ops, given: Given) -> None:
    """Compare all ops of gated MLPs with the reference.

    In a narrow precision its y is not rounded, as theirs is: two roundings to one.
    """
    roundings = 2 if given.x.dtype.itemsize == 2 else 1
    tolerance = roundings * TOLERANCE[given.x.dtype]
    results = [run_gate(one, given) for one in (ops, reference)]
    if given.offsets is None:
        results = [
            [*run_all(one, given), *r] for one, r in zip((ops, reference), results, strict=True)
        ]
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert relative_error(got, expected) < tolerance


def merged(given: Given, x: Tensor, factors: list[Tensor], weights: Tensor | None) -> Tensor:
    """Return z in plain torch, by merged weights."""
    a1, b1, a2, b2 = factors
    w1, w2 = given.base
    rows = a1.chunk(2) if given.segments else (a1, a1)
    updates = [b @ a for b, a in zip(b1.chunk(2), rows, strict=True)]
    gate, up = (x @ (w1 + 0.5 * torch.cat(updates)).mT).chunk(2, dim=-1)
    a = F.silu(gate) * up
    a = a if weights is None else a * weights.unsqueeze(-1)
    return a @ (w2 + 0.3 * b2 @ a2).mT


def by_node(
    ops: Ops, given: Given, x: Tensor, factors: list[Tensor], weights: Tensor | None
) -> Tensor:
    """Return z by the autograd node."""
    a1, b1, a2, b2 = factors
    w1, w2 = given.base
    one = Call(ops=ops, route=LOCAL_ROUTE, scale=0.5, segments=given.segments)
    two = dataclasses.replace(one, scale=0.3, segments=[])
    return apply(OpenedGatedMLP, x, a1, b1, a2, b2, weights, w1, w2, one, two)


def leaves_of(given: Given) -> list[Tensor]:
    """Return x, the factors and the weights, all trained."""
    tensors = [given.x, *given.factors, *([] if given.weights is None else [given.weights])]
    return [tensor.clone().requires_grad_() for tensor in tensors]


def split(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Return x, the factors and the weights."""
    return leaves[0], leaves[1:5], leaves[5] if len(leaves) > 5 else None


def assert_node_is_of_merged_weights(ops: Ops, given: Given) -> None:
    """Compare the autograd node in a narrow precision with merged weights in fp64."""
    leaves = leaves_of(given)
    z = by_node(ops, given, *split(leaves))
    found = [z, *torch.autograd.grad(z, leaves, given.dz)]
    exact = moved(given, torch.float64)
    z = merged(exact, *split(same := leaves_of(exact)))
    for got, expected in zip(found, [z, *torch.autograd.grad(z, same, exact.dz)], strict=True):
        assert relative_error(got, expected) < 3 * TOLERANCE[given.x.dtype]
