"""Start the distributed tests: one torchrun for each world size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 600
TAIL_LINES = 80


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_passes_its_distributed_tests(world_size: int, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(world_size)),
        *("--log-dir", str(tmp_path), "--redirects", "3"),
        # -x: after a failure, a rank's next collective would pair with a stale one of another.
        *("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
        # Megatron's own warnings would hide the failure.
        *("--disable-warnings", "tests/dist"),
        *("-m", f"world_{world_size}"),
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {TIMEOUT_S} s\n{tail_of_logs(tmp_path)}", pytrace=False)
    if finished.returncode:
        launcher = finished.stderr[-500:]
        pytest.fail(f"{tail_of_logs(tmp_path)}\n{launcher}", pytrace=False)


def tail_of_logs(directory: Path) -> str:
    """Return the last lines of the ranks that tell of a failure, or of all if none does."""
    logs = {path: path.read_text(errors="replace") for path in directory.rglob("std*.log")}
    telling = {path: text for path, text in logs.items() if "FAILED" in text or "ERROR" in text}
    return "\n".join(
        f"== rank {path.parent.name}, {path.name}\n" + "\n".join(text.splitlines()[-TAIL_LINES:])
        for path, text in sorted((telling or logs).items())
        if text.strip()
    )
