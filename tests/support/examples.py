"""Run the scripts of examples/ in forked processes, which have Megatron imported."""

from collections.abc import Sequence
from pathlib import Path

from tests.support.forked import ROOT, Ranks

EXAMPLES = ROOT / "examples"


def run_example(name: str, flags: Sequence[object], logs: Path, *, world_size: int = 1) -> str:
    """Run an example on so many ranks; return what all wrote, which ends the test if one fails."""
    run = Ranks(world_size, flags, logs, script=EXAMPLES / name, by_megalora=False)
    return run.succeed().text()
