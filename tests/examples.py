"""Run the scripts of examples/ in forked processes, which have Megatron imported."""

import os
import runpy
import socket
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.forked import call

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, flags: Sequence[object], logs: Path, *, world_size: int = 1) -> str:
    """Run an example on so many ranks; return what all wrote, which ends the test if one fails."""
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank{rank}.log" for rank in range(world_size)]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world_size}
    argv = [str(EXAMPLES / name), *(str(flag) for flag in flags)]

    def run(rank: int) -> int:
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        return call(_run, argv, {key: str(own[key]) for key in own}, str(files[rank]))

    with ThreadPoolExecutor(world_size) as pool:
        statuses = list(pool.map(run, range(world_size)))
    text = "\n".join(file.read_text(errors="replace") for file in files)
    assert statuses == [0] * world_size, text
    return text


def _run(argv: list[str], env: dict[str, str], log: str) -> int:
    os.environ.update(env)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except BaseException:
        # A script ends by SystemExit, with its message.
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0
