"""When the batch script of Slurm requeues, with stand-ins for srun, scancel, scontrol and torchrun.

The stand-ins only pass on signals and write down what is asked of them: Slurm itself is not tested.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forked import ROOT
from tests.support.watchdog import POLL_S, STALL_S

SCRIPT = ROOT / "examples" / "slurm_multinode.sbatch"
TRACKER = "latest_checkpointed_iteration.txt"

# srun runs a node's part here, and scancel signals all of it, as slurmstepd does.
SRUN = """#!/usr/bin/env bash
shift
setsid --wait bash -c 'echo $$ > "$WORK/step"; exec "$@"' step "$@"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >> "$WORK/asked"
kill "-${1#--signal=}" -- "-$(cat "$WORK/step")"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo node1; else echo "scontrol $*" >> "$WORK/asked"; fi
"""
# Writes down which ranks the script has seen.
PGREP = f"""#!/usr/bin/env bash
{shutil.which("pgrep")} "$@" | tee -a "$WORK/seen"
"""
# torchrun starts one rank, which saves and ends when it gets SIGTERM, or does what RANK says.
TORCHRUN = """#!/usr/bin/env bash
trap 'echo torchrun got SIGTERM >> "$WORK/asked"' TERM
setsid bash -c '
  trap "echo 7 > \\"$WORK/out/latest_checkpointed_iteration.txt\\"; exit 0" TERM
  touch "$WORK/ready"; eval "$DO"; while :; do sleep 0.05; done' &
wait $!
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name, text in {
        "srun": SRUN,
        "scancel": SCANCEL,
        "scontrol": SCONTROL,
        "pgrep": PGREP,
        "torchrun": TORCHRUN,
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / TRACKER).write_text("3\n")
    return tmp_path


def start(work: Path, do: str = "") -> subprocess.Popen:
    env = {
        **os.environ,
        "PATH": f"{work}:{os.environ['PATH']}",
        "WORK": str(work),
        "DO": do,
        "PYTHON": str(work / "torchrun"),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node1",
    }
    words = ["bash", str(SCRIPT), "train.py", "--save", str(work / "out"), "--lora-rank", "8"]
    return subprocess.Popen(words, env=env)


def asked(work: Path) -> list[str]:
    file = work / "asked"
    return file.read_text().splitlines() if file.exists() else []


def test_the_end_of_the_time_saves_and_requeues(work: Path) -> None:
    job = start(work)
    wait_until((work / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=STALL_S) == 0
    assert (work / "out" / TRACKER).read_text() == "7\n"
    assert asked(work) == ["scancel --signal=USR2 42.0", "scontrol requeue 42"]


def test_a_run_that_ends_well_is_not_requeued(work: Path) -> None:
    assert start(work, "exit 0").wait(timeout=STALL_S) == 0
    assert asked(work) == []


def test_a_failed_run_is_requeued_where_it_had_saved(work: Path) -> None:
    job = start(work, f'echo 5 > "$WORK/out/{TRACKER}"; exit 3')
    assert job.wait(timeout=STALL_S) == 3
    assert asked(work) == ["scontrol requeue 42"]


def test_a_failed_run_that_saved_nothing_is_not_requeued(work: Path) -> None:
    assert start(work, "exit 3").wait(timeout=STALL_S) == 3
    assert asked(work) == []


def test_no_rank_outlives_a_torchrun_that_was_killed(work: Path) -> None:
    # The rank's parent is torchrun's stand-in.
    seen = 'until [[ -s "$WORK/seen" ]]; do sleep 0.05; done'
    job = start(work, f'echo $$ > "$WORK/rank"; {seen}; kill -KILL $PPID')
    assert job.wait(timeout=STALL_S) == 137
    rank = int((work / "rank").read_text())
    wait_until(lambda: not is_running(rank))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + STALL_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(POLL_S)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
