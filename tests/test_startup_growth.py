"""No step of a start costs a rank more because there are more ranks: 64 and 4,096 compared.

The world is torch's fake process group, of which `benchmarks/bench_startup.py` counts what is sent
and called. Both worlds have the same tensor, pipeline and expert parallelism, and read the same.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked

SMALL, LARGE = 64, 4096
# Fewer than one call for each of fifty more ranks: what differs by chance, as of caches.
FEW = 80

# Of a step: what it receives, unpickles, reads and calls.
type Counts = dict[str, dict[str, Any]]


def bench() -> Any:
    """Return the benchmark's module."""
    sys.path.insert(0, str(forked.ROOT / "benchmarks"))
    import bench_startup

    return bench_startup


def write(place: Path) -> None:
    """Write what both worlds read."""
    with contextlib.redirect_stdout(io.StringIO()):
        bench().write_base(place / "base", layout(SMALL))
        bench().write_checkpoint(place / "checkpoint", layout(SMALL))


def layout(world_size: int) -> Any:
    return bench().Layout(world_size, tp=2, pp=4, ep=8)


def counts(world_size: int, place: Path) -> Counts:
    """Return what each step of a start costs rank 0 of a world, after one start to warm up."""
    module, found = bench(), {}
    with contextlib.redirect_stdout(io.StringIO()):
        module.fake_world(layout(world_size))
        for _name, step in module.start_up(layout(world_size), place):
            step()
        for name, step in module.start_up(layout(world_size), place):
            with module.counted(found.setdefault(name, {})):
                step()
    return found


def rehearse(results: Path) -> str:
    """Run the benchmark of two tiny worlds; return what it prints."""
    words = ("--world-sizes", "2", "4", "--rounds", "1", "--place", results.parent)
    sys.argv = ["bench_startup.py", *map(str, words), "--results", str(results)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bench().main()
    return out.getvalue()


def test_each_step_gets_a_line_of_results_and_of_each_table(tmp_path: Path) -> None:
    printed = forked.call(rehearse, tmp_path / "results.jsonl")
    about, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert "torch" in about["machine"]
    assert {row["world_size"] for row in rows} == {2, 4}
    for row in rows:
        assert row["bench"] == "startup"
        assert row["ms"] > 0
        assert printed.count(f"| {row['step']} | ") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counts, Counts]:
    place = tmp_path_factory.mktemp("startup")
    forked.call(write, place)
    return forked.call(counts, SMALL, place), forked.call(counts, LARGE, place)


def test_all_steps_are_counted(both: tuple[Counts, Counts]) -> None:
    small, large = both
    assert list(small) == list(large)
    assert {"flags", "find", "base", "attach", "fingerprint", "plan", "rewards"} <= set(small)
    assert all(counted["calls"] for counted in small.values())
    assert small["gather"]["objects"] == 4
    assert small["base"]["read_bytes"] > 0


@pytest.mark.parametrize("what", ["objects", "received_bytes"])
def test_what_a_rank_is_sent_does_not_grow(what: str, both: tuple[Counts, Counts]) -> None:
    small, large = both
    # What each replica has, whose number grows, is told to all.
    grown = {n for n in small if large[n][what] > small[n][what] and n != "rewards"}
    assert not grown, {n: (small[n][what], large[n][what]) for n in grown}


def test_no_step_loops_over_ranks(both: tuple[Counts, Counts]) -> None:
    small, large = both
    more = {name: large[name]["calls"] - small[name]["calls"] for name in small}
    grown = {name for name, calls in more.items() if calls > FEW}
    assert not grown, {n: (small[n]["calls"], large[n]["calls"]) for n in grown}


def bytes_of_the_embedding() -> int:
    """Return the bytes of a rank's part of it."""
    config = layout(SMALL).config()
    size = config["vocab_size"] * config["hidden_size"] * bench().DTYPE_BYTES
    return size // layout(SMALL).tp


def test_replicas_share_what_is_read_of_a_base(both: tuple[Counts, Counts]) -> None:
    # The embedding is one tensor, which rank 0 reads in both; the rest, 4 and 512 replicas share.
    table = forked.call(bytes_of_the_embedding)
    small, large = (counted["base"]["read_bytes"] - table for counted in both)
    assert 0 < large < small / 4
