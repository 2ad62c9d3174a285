"""An adapted linear on a GPU, by one launch and by its products, against float64.

benchmarks/gpu_check.py runs these.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megalora.ops import reference
from megalora.ops.fused import load
from tests.support.float64 import assert_close, assert_equal, assert_right, in_doubles
from tests.support.op_cases import Case, Problem, run_linear

fused = load()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the one launch is for compute capability 9.0",
)

# Whole tiles, tails in every size, projections side by side and interleaved, most columns of s.
CASES = [
    Case(256, 64, (256,), 1, rank=16),
    Case(300, 328, (520,), 1, rank=8),
    Case(128, 1000, (264,), 1, rank=64),
    Case(1000, 512, (512, 128, 128), 2, rank=16),
    Case(2000, 640, (512, 512), 1, rank=64),
    Case(700, 328, (520,), 1, rank=128),
    Case(333, 136, (6, 2, 0), 25, rank=40),  # a rank that owns no values; periods within a tile
    Case(5000, 1024, (512, 128, 128), 8, rank=48),
    Case(700, 264, (24, 24), 5, rank=128),
    Case(8192, 4096, (4096,), 1, rank=16),
]
ONE_LAUNCH, PRODUCTS = "linear:kernels", "linear:gemm"
KERNEL = "linear_kernel"


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Let torch fill empty tensors, which shows what is left out, and cuBLAS add in fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    matmul.allow_bf16_reduced_precision_reduction = before


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the one launch wherever it can be taken, however few tiles there are."""
    monkeypatch.setenv("MEGALORA_CUDA_ROUTE", ONE_LAUNCH)


def draw(case: Case, seed: int = 0) -> Problem:
    """Return random bf16 tensors of a dense case, drawn on the GPU, whose products are near 1."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rank, num_columns = len(case.segments) * case.rank, sum(case.segments) * case.periods

    def normal(*shape: int, over: int = 1) -> Tensor:
        drawn = torch.randn(shape, device="cuda", generator=generator) / over**0.5
        return drawn.bfloat16()

    return Problem(
        x=normal(case.tokens, case.in_features),
        y=normal(case.tokens, num_columns),
        s=normal(case.tokens, rank),
        lora_A=normal(rank, case.in_features, over=case.in_features),
        lora_B=normal(num_columns, case.rank, over=case.rank),
        weight=normal(num_columns, case.in_features, over=case.in_features),
        offsets=None,
        segments=case.op_segments,
    )


def kernels_of(given: Problem) -> str:
    """Return the names of all kernels that a forward and a backward launch."""
    run_linear(fused, given)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run_linear(fused, given)
        torch.cuda.synchronize()
    return "\n".join(event.key for event in profile.key_averages())


@pytest.mark.parametrize("route", [ONE_LAUNCH, PRODUCTS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_linear_matches_float64(case: Case, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALORA_CUDA_ROUTE", route)
    assert_right(run_linear, draw(case))


def test_a_projection_that_reads_another_rank_block_is_noticed() -> None:
    """Control: the comparison must fail where projections are mixed up."""
    given = draw(CASES[3])
    expected = run_linear(reference, in_doubles(given))
    mixed = dataclasses.replace(given, segments=[128, 512, 128])
    for name in ("linear y", "linear_backward dx", "linear_backward dB"):
        with pytest.raises(AssertionError):
            assert_close(run_linear(fused, mixed)[name], expected[name], name)


@on_hopper
def test_hopper_takes_the_one_launch_where_tiles_fill_it() -> None:
    large, small = draw(CASES[-1]), draw(Case(512, 4096, (4096,), 1, rank=16))
    assert KERNEL in kernels_of(large)
    assert KERNEL not in kernels_of(small)


@on_hopper
@pytest.mark.parametrize(
    ("case", "taken"),
    [
        (Case(300, 328, (520,), 1, rank=8), True),
        (Case(300, 328, (260, 260), 1, rank=4), True),  # both ranks are 8 columns of s
        (Case(300, 328, (520,), 1, rank=12), False),
        (Case(300, 324, (520,), 1, rank=8), False),
        (Case(300, 328, (524,), 1, rank=8), False),
        (Case(300, 328, (257, 263), 1, rank=8), False),
        (Case(300, 328, (520,), 1, rank=264), False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("one_launch")
def test_what_the_one_launch_cannot_do_is_computed_by_products(case: Case, taken: bool) -> None:
    given = draw(case)
    assert (KERNEL in kernels_of(given)) == taken
    assert_right(run_linear, given)


@on_hopper
@pytest.mark.usefixtures("one_launch")
def test_a_weight_that_is_stored_transposed_is_computed_by_products() -> None:
    given = draw(Case(300, 520, (520,), 1, rank=8))
    given = dataclasses.replace(given, weight=given.weight.T.contiguous().T)
    assert KERNEL not in kernels_of(given)
    assert_right(run_linear, given)


@pytest.mark.usefixtures("one_launch")
def test_tokens_may_be_strided_and_start_anywhere() -> None:
    given = draw(CASES[1])

    def moved(tokens: Tensor) -> Tensor:
        """Return the same values between others, at an address that no tensor copy reads."""
        wide = torch.full((tokens.shape[0], tokens.shape[1] + 7), float("nan")).to(tokens)
        inside = wide[:, 3:-4]
        inside.copy_(tokens)
        return inside

    names = ("x", "y", "s")
    strided = dataclasses.replace(given, **{name: moved(getattr(given, name)) for name in names})
    assert_right(run_linear, strided)


@pytest.mark.usefixtures("one_launch")
def test_calls_of_all_sizes_repeat_themselves_bit_for_bit() -> None:
    """Each finds the words zero that tell blocks of one launch what is done."""
    problems = [draw(case) for case in CASES]
    first = [run_linear(fused, given) for given in problems]
    for _ in range(3):
        for given, expected in zip(problems, first, strict=True):
            assert_equal(run_linear(fused, given), expected)


@pytest.mark.usefixtures("one_launch")
def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    problems = [draw(CASES[-1], seed) for seed in (1, 2)]
    alone = [run_linear(fused, given) for given in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, given in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(run_linear(fused, given))
        torch.cuda.synchronize()
        for one, two in zip(found, alone, strict=True):
            assert_equal(one, two)


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize("case", [CASES[3], CASES[-1]], ids=str)
def test_a_linear_replays_from_a_graph(case: Case) -> None:
    given = draw(case)
    expected = run_linear(fused, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run_linear(fused, given)
    for _ in range(3):
        for result in replayed.values():
            result.fill_(float("nan"))
        run_linear(fused, given)  # between replays, on the same stream
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(replayed, expected)
