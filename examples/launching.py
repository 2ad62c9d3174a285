"""What examples of several steps share: start scripts, show and keep what they say, read losses."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).resolve().parent
TRAIN = EXAMPLES / "pretrain_lora.py"
VERIFY = EXAMPLES / "verify_export.py"

_LOSS = re.compile(
    r"iteration +(\d+)/ *(\d+) .*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: (\S+)"
)
_VALIDATION = re.compile(r"validation loss at iteration (\d+).*?lm loss value: (\S+)")
_SHOWN = re.compile(
    r"iteration +\d+/|validation loss|data: \d|> LoRA|> lr auto|^megalora|error|verified|exported",
    re.I,
)


class Interval(NamedTuple):
    """One line of Megatron's log: the mean time and loss of the iterations since the last."""

    iteration: int
    milliseconds: float
    loss: float


def launch(num_processes: int, script: Path, flags: Sequence[object], log: Path) -> None:
    """Run a script under torchrun, as `run` does; the processes share the cores."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    run([*torchrun, script, *flags], log, num_threads=num_cores() // num_processes)


def run(command: Sequence[object], log: Path, *, num_threads: int | None = None) -> None:
    """Run Python, write all it says to `log`, show what a person wants to see.

    num_threads: of each process. Ends the program where it fails, with its last lines.
    """
    threads = str(max(1, num_threads or num_cores()))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if _SHOWN.search(line) and "....." not in line:
                print("  " + shorten(line), flush=True)
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-40:])
        raise SystemExit(f"{tail}\nerror: this step failed; all it said is in {log}")


def num_cores() -> int:
    """Return how many cores this program may use."""
    return len(os.sched_getaffinity(0))


def shorten(line: str) -> str:
    """Keep of one of Megatron's log lines what a person reads."""
    if found := _VALIDATION.search(line):
        return f"iteration {found[1]:>4}   loss on held-out rows {float(found[2]):.3f}"
    found = _LOSS.search(line)
    if not found:
        return line.strip()[:150]
    iteration, total, milliseconds, loss = found.groups()
    left = (int(total) - int(iteration)) * float(milliseconds) / 1000
    return (
        f"iteration {iteration:>4}/{total}   loss {float(loss):.3f}   "
        f"{float(milliseconds):.0f} ms   {left:.0f} s left"
    )


def curve(log: Path) -> list[Interval]:
    """Return every interval that a run logged."""
    found = _LOSS.findall(log.read_text()) if log.exists() else []
    return [Interval(int(i), float(ms), float(loss)) for i, _, ms, loss in found]


def held_out_curve(log: Path) -> dict[int, float]:
    """Return the losses on held-out rows that a run logged, by iteration."""
    return {int(iteration): float(loss) for iteration, loss in _VALIDATION.findall(log.read_text())}


def print_table(rows: Mapping[str, str]) -> None:
    """Print what was found, a line each."""
    width = max(map(len, rows))
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()), flush=True)


def step(title: str) -> None:
    """Announce a step."""
    print(f"\n{title}", flush=True)
