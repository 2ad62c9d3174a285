"""The pass of a gated MLP on a GPU against the reference; benchmarks/gpu_check.py runs these."""

import pytest
import torch
from torch import Tensor

from megalora.ops.fused import load
from tests.support.gated_cases import (
    KERNEL_CASES,
    Case,
    Given,
    assert_gated_matches_reference,
    assert_node_is_of_merged_weights,
    by_node,
    draw,
    leaves_of,
    moved,
    run_all,
    split,
)

fused = load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Sizes that fill a GPU: a dense layer; ranks of two rank tiles; an expert with weights of tokens.
LARGE = [
    Case(4096, 1024, 4096, (16, 16), weighs=False),
    Case(2049, 512, 2056, (32, 8), splits=False, weighs=False),
    Case(1100, 512, 768, (4, 4), weights_are_fp32=True),
]
SHAPES = pytest.mark.parametrize("case", [*KERNEL_CASES, *LARGE], ids=str)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SHAPES
def test_both_passes_on_a_gpu_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    assert_gated_matches_reference(fused, moved(draw(case, dtype), "cuda"))


def test_gates_that_saturate_on_a_gpu_are_finite() -> None:
    assert_gated_matches_reference(fused, moved(draw(LARGE[2], torch.bfloat16, spread=1e4), "cuda"))


@SHAPES
def test_a_gpu_repeats_itself_bit_for_bit(case: Case) -> None:
    given = moved(draw(case, torch.bfloat16), "cuda")
    first, second = run_all(fused, given), run_all(fused, given)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("route", ["gate:kernels", "gate:gemm", ""])
def test_the_route_decides_which_way_a_layer_takes(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALORA_CUDA_ROUTE", route)
    weight = torch.empty(8, 64, device="cuda", dtype=torch.bfloat16)
    if route:
        assert fused.gated_mlp_is_fused(weight, 4, 4) == (route == "gate:kernels")
    assert not fused.gated_mlp_is_fused(weight, 4, 33)
    assert not fused.gated_mlp_is_fused(weight.float(), 4, 4)
    assert not fused.gated_mlp_is_fused(weight[:, :63].contiguous(), 4, 4)


def test_what_no_kernel_computes_is_refused() -> None:
    given = moved(draw(Case(16, 8, 64, (33, 4)), torch.bfloat16), "cuda")
    with pytest.raises(ValueError, match="64 columns of gate and rank 33 are not computed"):
        fused.gated_mlp(given.x, *given.how())


def test_a_view_at_an_odd_address_is_refused() -> None:
    given = moved(draw(KERNEL_CASES[1], torch.bfloat16), "cuda")
    y = torch.empty(given.y.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:]
    message = "y is a view that begins at no multiple of 16 bytes: give a copy of it"
    with pytest.raises(ValueError, match=message):
        fused.gate_(y.view_as(given.y), given.thin[0], *given.gate_how())


def both_passes(given: Given, leaves: list[Tensor]) -> list[Tensor]:
    """Return z and every gradient, by the autograd node."""
    z = by_node(fused, given, *split(leaves))
    return [z, *torch.autograd.grad(z, leaves, given.dz)]


def test_both_passes_of_a_gated_mlp_replay_from_a_graph() -> None:
    given = moved(draw(LARGE[0], torch.bfloat16), "cuda")
    leaves = leaves_of(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in both_passes(given, leaves)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both_passes(given, leaves)
    for result in replayed:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(replayed, expected, strict=True))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_node_is_that_of_merged_weights(case: Case) -> None:
    assert_node_is_of_merged_weights(fused, moved(draw(case, torch.bfloat16), "cuda"))
