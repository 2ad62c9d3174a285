"""What this device reaches: a large copy and a large GEMM. Every floor is derived from these.

python benchmarks/bench_device.py [--results FILE]
"""

import argparse
from pathlib import Path

import torch
from _results import append, machine
from _timing import ceilings


def main() -> None:
    """Measure, print, write JSON lines where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="file to add the numbers to, as JSON lines")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = ceilings(device, dtype)
    row = {
        "copied_TB_per_s": found.copied_bytes / 1e12,
        "gemm_TFLOP_per_s": found.gemm_flops / 1e12,
    }
    print(f"{machine(device)['device']}: {row} ({dtype})")
    append(options.results, {"bench": "device", "dtype": str(dtype)} | row | machine(device))


if __name__ == "__main__":
    main()
