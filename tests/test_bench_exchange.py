"""benchmarks/bench_exchange.py measures every command, rehearsed at toy size."""

import contextlib
import io
import json
import sys
from pathlib import Path

from tests.support import forked


def rehearse(results: Path) -> str:
    """Run the benchmark in this process and copies of it; return what it prints."""
    sys.path.insert(0, str(forked.ROOT / "benchmarks"))
    import bench_exchange

    words = ("--toy", "--rounds", "1", "--place", results.parent, "--results", results)
    sys.argv = ["bench_exchange.py", *map(str, words)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        bench_exchange.main()
    return out.getvalue()


def test_each_command_gets_a_line_of_results_and_of_the_table(tmp_path: Path) -> None:
    printed = forked.call(rehearse, tmp_path / "results.jsonl")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    about, *rows = map(json.loads, lines)
    assert "torch" in about["machine"]
    commands = ["import", *(f"export {f}" for f in ("peft", "uniform", "peft-3d")), "inspect"]
    assert [row["variant"] for row in rows] == commands
    for row in rows:
        assert (row["bench"], row["model"], row["rank"]) == ("exchange", "qwen3-30b-a3b", 32)
        assert row["wall_s"] > 0
        assert row["peak_bytes"] > 50 * 2**20
        assert f"\n| {row['variant']} | " in printed
    assert printed.endswith("imported and exported again without a loss: True\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
