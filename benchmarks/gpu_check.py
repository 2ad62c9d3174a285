"""Everything that needs a GPU, in one go: the tests marked gpu, then all benchmarks.

python benchmarks/gpu_check.py [--rounds 15]

Results go to benchmarks/results/<GPU>/: one JSON file for each benchmark, made to be committed.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parent
BENCHES = ("bench_linear.py", "bench_experts.py", "bench_model.py")


def run(*command: str) -> bool:
    """Run a command with this interpreter, its output shown; return whether it succeeded."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, *command], cwd=BENCHMARKS.parent).returncode == 0


def main() -> int:
    """Run all and return the exit status: 0 if nothing failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was tested or measured", file=sys.stderr)
        return 2
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-")
    results = BENCHMARKS / "results" / name
    failed = [] if run("-m", "pytest", "-m", "gpu", "tests") else ["tests"]
    if failed:
        print("the kernels are not right here: their times would mean nothing", file=sys.stderr)
        return 1
    for bench in BENCHES:
        target = results / bench.replace(".py", ".json")
        rounds = ("--rounds", str(options.rounds))
        if not run(f"benchmarks/{bench}", *rounds, "--json", str(target)):
            failed.append(bench)
    print(f"\nresults in {results}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
