"""Start the distributed tests: one torchrun for each world size."""

import os
import sys
from pathlib import Path

import pytest

from tests.forked import ROOT
from tests.watchdog import run_watched, tail_of_logs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_passes_its_distributed_tests(world_size: int, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(world_size)),
        *("--log-dir", str(tmp_path), "--redirects", "3"),
        # -x: after a failure, a rank's next collective would pair with a stale one of another.
        # -v: every test that starts is written at once, which the watchdog takes for progress.
        *("-m", "pytest", "-x", "-v", "-p", "no:cacheprovider"),
        # Megatron's own warnings would hide the failure.
        *("--disable-warnings", "tests/dist"),
        *("-m", f"world_{world_size}"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = run_watched(command, tmp_path, cwd=ROOT, env=env)
    if finished.returncode:
        pytest.fail(tail_of_logs(tmp_path), pytrace=False)
