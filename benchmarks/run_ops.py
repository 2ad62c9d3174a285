"""Run every op on small cases on the GPU and compare with the reference: for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/run_ops.py
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from megalora.ops import reference
from megalora.ops.fused import load
from tests.support import gated_cases
from tests.support.op_cases import CASES, TOLERANCE, Case, draw, on, relative_error, run_all

# What Hopper computes in one launch each way, of sizes that it can: dense and of experts.
ONE_LAUNCH_CASES = [
    Case(300, 328, (520,), 1, rank=8),
    Case(1000, 512, (512, 128, 128), 2, rank=16),
    Case(600, 256, (256, 256), 1, rank=4, experts=4),
    Case(700, 136, (136,), 1, rank=72, experts=3),
]


def wrong_results(case: Case, dtype: torch.dtype, p: float, device: torch.device) -> Iterator[str]:
    """Yield a line for each result that is not the reference's."""
    given = draw(case, dtype)
    expected = run_all(reference, given, p)
    for name, got in run_all(load(), on(device, given), p).items():
        error = relative_error(got.cpu(), expected[name])
        if not error < TOLERANCE[got.dtype]:
            yield f"{name}, {case}, {dtype}, dropout {p}: relative error {error:.3g}"


def wrong_gated_results(case: gated_cases.Case, device: torch.device) -> Iterator[str]:
    """Yield a line where a result of a gated MLP is not the reference's."""
    # Each device in what its own pass computes.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        given = gated_cases.moved(gated_cases.draw(case, dtype), device.type)
        gated_cases.assert_gated_matches_reference(load(), given)
    except AssertionError as error:
        yield f"{case}: {error}"


def main() -> int:
    """Return 1 where a result is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = [
        found
        for dtype in (torch.bfloat16, torch.float32)
        for case in CASES
        for p in (0.0, 0.3)
        for found in wrong_results(case, dtype, p, device)
    ]
    os.environ["MEGALORA_CUDA_ROUTE"] = "linear:kernels"  # however few tiles they have
    for case in ONE_LAUNCH_CASES:
        wrong += wrong_results(case, torch.bfloat16, 0.0, device)
    for case in gated_cases.KERNEL_CASES:
        wrong += wrong_gated_results(case, device)
    cases = len(CASES) + len(ONE_LAUNCH_CASES) + len(gated_cases.KERNEL_CASES)
    print("\n".join([*wrong, f"{cases} cases on {device}: {len(wrong)} results are wrong"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
