"""Shapes for the ops and their comparison with the reference, for whatever implements them."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora.ops import Ops, reference

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


@dataclass(frozen=True)
class Case:
    """One shape: columns come in `periods` periods of `segments`; experts 0 means dense."""

    tokens: int
    in_features: int
    segments: tuple[int, ...]
    periods: int
    rank: int
    experts: int = 0

    @property
    def op_segments(self) -> list[int]:
        """Return what the ops take: no segments where there is one projection."""
        return list(self.segments) if len(self.segments) > 1 else []

    def __str__(self) -> str:
        columns = "x".join(map(str, self.segments))
        sizes = f"t{self.tokens}-i{self.in_features}-o{columns}x{self.periods}"
        return f"{sizes}-r{self.rank}-e{self.experts}"


CASES = [
    Case(7, 33, (17,), 1, rank=3),
    Case(70, 136, (5, 2, 2), 3, rank=4),  # q, k, v interleaved by query group
    Case(65, 200, (32, 32), 1, rank=1),  # gate and up
    Case(1, 1, (1,), 1, rank=1),
    Case(40, 72, (70,), 1, rank=150),
    Case(520, 16, (24,), 1, rank=9),
    Case(90, 72, (17,), 1, rank=5, experts=4),
    Case(130, 24, (3, 4), 5, rank=2, experts=5),
    Case(300, 40, (8, 2, 2), 2, rank=16, experts=2),
    Case(80, 80, (64, 70), 1, rank=20, experts=3),
    Case(5, 16, (16,), 1, rank=8, experts=9),
    Case(40, 24, (6, 0, 3), 2, rank=4),  # a rank that owns no keys
    Case(0, 8, (4, 4), 1, rank=2),
    Case(0, 8, (8,), 1, rank=2, experts=3),
]


@dataclass(frozen=True)
class Problem:
    """Random tensors of one case."""

    x: Tensor
    y: Tensor
    s: Tensor
    lora_A: Tensor
    lora_B: Tensor
    weight: Tensor
    offsets: Tensor | None
    segments: list[int]


def draw_offsets(case: Case, generator: torch.Generator) -> Tensor | None:
    """Return random cumulative token counts with an empty expert, None for a dense case."""
    if case.experts == 0:
        return None
    ends = torch.randint(0, case.tokens + 1, (case.experts,), generator=generator).sort().values
    ends[1] = ends[0]
    ends[-1] = case.tokens
    return ends if case.experts % 2 else ends.int()


def draw(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Return random tensors of a case."""
    generator = torch.Generator().manual_seed(seed)
    experts = (case.experts,) if case.experts else ()
    num_columns = sum(case.segments) * case.periods
    stacked_rank = len(case.segments) * case.rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Problem(
        x=normal(case.tokens, case.in_features),
        y=normal(case.tokens, num_columns),
        s=normal(case.tokens, stacked_rank),
        lora_A=normal(*experts, stacked_rank, case.in_features),
        lora_B=normal(*experts, num_columns, case.rank),
        weight=normal(num_columns, case.in_features),
        offsets=draw_offsets(case, generator),
        segments=case.op_segments,
    )


def on(device: torch.device | str, given: Problem) -> Problem:
    """Return the same problem on a device."""
    tensors = {
        name: value.to(device) for name, value in vars(given).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(given, **tensors)


def accumulators(weight: Tensor) -> list[Tensor]:
    """Return gradients to add to, not zero: of the weight's dtype, and fp32 beside a narrow one."""
    copies = [weight.clone()]
    return copies if weight.dtype.itemsize >= 4 else [*copies, weight.float()]


def run_all(ops: Ops, given: Problem, p: float) -> dict[str, Tensor]:
    """Return the results of every op, those in place on copies."""
    dropout = {"p": p, "seed": torch.tensor([2**40 + 7], device=given.x.device)}
    offsets, segments = given.offsets, given.segments
    y, dx = given.y.clone(), given.x.clone()
    ops.expand_(y, given.s, given.lora_B, 0.7, offsets, segments)
    ops.shrink_dgrad_(dx, given.s, given.lora_A, offsets, **dropout)
    ds, d_b = ops.expand_backward(given.y, given.s, given.lora_B, 0.7, offsets, segments)
    added: dict[str, Tensor] = {}
    for d_b_sum in accumulators(given.lora_B):
        ops.expand_wgrad_(d_b_sum, given.y, given.s, 0.7, offsets, segments)
        added[f"expand_wgrad_ in {d_b_sum.dtype}"] = d_b_sum
    for d_b_sum in accumulators(given.lora_B):
        how = (given.lora_B, 0.7, offsets, segments)
        added[f"expand_backward_ ds in {d_b_sum.dtype}"] = ops.expand_backward_(
            d_b_sum, given.y, given.s, *how
        )
        added[f"expand_backward_ dB in {d_b_sum.dtype}"] = d_b_sum
    for d_a_sum in accumulators(given.lora_A):
        ops.shrink_wgrad_(d_a_sum, given.s, given.x, offsets, **dropout)
        added[f"shrink_wgrad_ in {d_a_sum.dtype}"] = d_a_sum
    return {
        **added,
        **(run_linear(ops, given) if offsets is None and p == 0.0 else {}),
        "shrink": ops.shrink(given.x, given.lora_A, offsets, **dropout),
        "expand_": y,
        "expand_dgrad": ops.expand_dgrad(given.y, given.lora_B, 0.7, offsets, segments),
        "expand_wgrad": ops.expand_wgrad(given.y, given.s, given.lora_B, 0.7, offsets, segments),
        "expand_backward ds": ds,
        "expand_backward dB": d_b,
        "shrink_dgrad_": dx,
        "shrink_wgrad": ops.shrink_wgrad(given.s, given.x, offsets, **dropout),
    }


def run_linear(ops: Ops, given: Problem) -> dict[str, Tensor]:
    """Return the results of the ops that have the base's product in them: dense, no dropout."""
    how = (given.weight, given.lora_A, given.lora_B, 0.7, given.segments)
    y, s = ops.linear(given.x, *how)
    names = ("dx", "ds", "dB")
    found = {"linear y": y, "linear s": s}
    results = {
        "linear_dgrad": ops.linear_dgrad(given.y, *how),
        "linear_backward": ops.linear_backward(given.y, given.s, *how),
    }
    for total in accumulators(given.lora_B):
        dx, ds = ops.linear_backward_(total, given.y, given.s, *how)
        results[f"linear_backward_ in {total.dtype}"] = (dx, ds, total)
    for op, tensors in results.items():
        found |= {f"{op} {name}": t for name, t in zip(names, tensors, strict=False)}
    return found


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value.

    Over 1 at least, the size of what is drawn: few sums may all be small by cancelling.
    """
    if expected.numel() == 0:
        return 0.0
    difference = (got.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1.0)).item()


def assert_matches_reference(ops: Ops, case: Case, dtype: torch.dtype, p: float) -> None:
    """Compare every op with the reference, shapes and dtypes included."""
    given = draw(case, dtype)
    expected = run_all(reference, given, p)
    for name, got in run_all(ops, given, p).items():
        assert got.shape == expected[name].shape, name
        assert got.dtype == expected[name].dtype, name
        assert relative_error(got, expected[name]) < TOLERANCE[got.dtype], name
