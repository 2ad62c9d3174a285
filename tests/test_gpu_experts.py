"""Experts with their adapters in one launch each way on a GPU, against float64.

benchmarks/gpu_check.py runs these.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from megalora.ops import reference
from megalora.ops.fused import load
from tests.support.float64 import assert_equal, assert_right, in_doubles
from tests.support.op_cases import Case, Problem, expert_weights, run_experts

fused = load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="no CUDA device of compute capability 9.0",
    ),
]

# Few and many experts and tokens, ranks that fill no vector, tails in every size.
CASES = [
    Case(600, 256, (256, 256), 1, rank=4, experts=4),
    Case(3000, 200, (328,), 1, rank=8, experts=8),
    Case(1000, 768, (2048,), 1, rank=4, experts=5),
    Case(8192, 512, (384, 384), 1, rank=4, experts=128),
    Case(5000, 512, (512, 512), 1, rank=32, experts=3),
    Case(2000, 256, (264,), 1, rank=1, experts=16),
    Case(700, 136, (136,), 1, rank=72, experts=4),
    Case(90, 64, (64,), 1, rank=2, experts=256),
]


def draw(case: Case, seed: int = 0) -> Problem:
    """Return random bf16 tensors on the GPU, whose products are near 1; one expert has no token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rank, num_columns = len(case.segments) * case.rank, sum(case.segments)

    def normal(*shape: int, over: int = 1) -> Tensor:
        drawn = torch.randn(shape, device="cuda", generator=generator) / over**0.5
        return drawn.bfloat16()

    popularity = torch.rand(case.experts, device="cuda", generator=generator) ** 3
    popularity[case.experts // 3] = 0
    chosen = torch.multinomial(popularity, case.tokens, replacement=True, generator=generator)
    counts = torch.bincount(chosen, minlength=case.experts)
    return Problem(
        x=normal(case.tokens, case.in_features),
        y=normal(case.tokens, num_columns),
        s=normal(case.tokens, rank),
        lora_A=normal(case.experts, rank, case.in_features, over=case.in_features),
        lora_B=normal(case.experts, num_columns, case.rank, over=case.rank),
        weight=normal(num_columns, case.in_features, over=case.in_features),
        offsets=counts.cumsum(0) if case.experts % 2 else counts.cumsum(0).int(),
        segments=case.op_segments,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts_match_float64(case: Case) -> None:
    given = draw(case)
    assert fused.experts_linear_is_fused(given.weight, case.experts, given.lora_A.shape[1])
    assert_right(run_experts, given)


def test_experts_of_another_order_are_noticed() -> None:
    """Control: the comparison must fail where an expert gets the tokens of another."""
    given = draw(CASES[0])
    expected = run_experts(reference, in_doubles(given))
    shifted = dataclasses.replace(given, lora_B=given.lora_B.roll(1, 0))
    got = run_experts(fused, shifted)
    for name in ("experts y", "experts dx"):
        assert (got[name].double() - expected[name]).norm() > 0.1 * expected[name].norm()


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero() -> None:
    given = draw(CASES[0])
    found = run_experts(fused, given)
    empty = CASES[0].experts // 3
    assert not found["experts dA"][empty].any()
    assert not found["experts dB"][empty].any()


def test_experts_repeat_themselves_bit_for_bit() -> None:
    """Which cluster does what differs from launch to launch; each sum is of one cluster."""
    problems = [draw(case) for case in CASES]
    first = [run_experts(fused, given) for given in problems]
    for _ in range(3):
        for given, expected in zip(problems, first, strict=True):
            assert_equal(run_experts(fused, given), expected)


def test_experts_replay_from_a_graph_once_they_have_run() -> None:
    given = draw(CASES[3])
    how = (expert_weights(given), given.lora_A, given.lora_B, 0.7, given.offsets, given.segments)
    expected, _ = fused.experts_linear(given.x, *how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, _ = fused.experts_linear(given.x, *how)
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, expected)


def test_the_first_run_of_experts_is_refused_in_a_graph() -> None:
    given = draw(CASES[2])
    weights = [given.weight + e for e in range(CASES[2].experts)]
    how = (weights, given.lora_A, given.lora_B, 0.7, given.offsets, given.segments)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="run them once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fused.experts_linear(given.x, *how)
