"""Run every op on small cases on the GPU and compare with the reference: for compute-sanitizer.

compute-sanitizer --tool memcheck python benchmarks/run_ops.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from megalora.ops import reference
from megalora.ops.fused import load
from tests.support.op_cases import CASES, TOLERANCE, draw, on, relative_error, run_all


def main() -> int:
    """Return 1 where a result is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = 0
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            for p in (0.0, 0.3):
                given = draw(case, dtype)
                expected = run_all(reference, given, p)
                for name, got in run_all(load(), on(device, given), p).items():
                    error = relative_error(got.cpu(), expected[name])
                    if not error < TOLERANCE[got.dtype]:
                        wrong += 1
                        print(f"{name}, {case}, {dtype}, dropout {p}: relative error {error:.3g}")
    print(f"{len(CASES)} cases on {device}: {wrong} results are wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
