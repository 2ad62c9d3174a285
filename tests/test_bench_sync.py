"""benchmarks/bench_sync.py measures every way of handing an adapter over, rehearsed at toy size."""

import contextlib
import io
import json
import sys
from pathlib import Path

from tests.support import forked


def rehearse(results: Path) -> str:
    """Run the benchmark in this process and copies of it; return what it prints."""
    sys.path.insert(0, str(forked.ROOT / "benchmarks"))
    import bench_sync

    words = ("--toy", "--rounds", "1", "--place", results.parent, "--results", results)
    sys.argv = ["bench_sync.py", *map(str, words)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        bench_sync.main()
    return out.getvalue()


def test_each_way_gets_a_line_of_results_and_of_the_table(tmp_path: Path) -> None:
    printed = forked.call(rehearse, tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    about, *rows = map(json.loads, lines)
    assert "torch" in about["machine"]
    ways = ["plan, once", "vLLM directory", "SGLang tensors", "merged, one layer"]
    assert [row["variant"] for row in rows] == [*ways, "merged, reckoned"]
    for row in rows:
        assert (row["bench"], row["model"], row["rank"]) == ("sync", "qwen3-30b-a3b", 32)
        assert row["wall_s"] > 0
        assert f"\n| {row['variant']} | " in printed
    by_way = {row["variant"]: row for row in rows}
    # What lies in the directory is the adapter and its header.
    adapter = by_way["vLLM directory"]["adapter_bytes"]
    assert adapter < by_way["vLLM directory"]["sent_bytes"] < 3 * adapter
    assert by_way["SGLang tensors"]["sent_bytes"] > adapter
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
