"""README's numbers of GPUs are those of the results, and nobody types them."""

import json
import sys
from pathlib import Path

from tests.support.forked import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_readme

SETTING = {"setting": {"device": "NVIDIA X1", "date": "2026-01-02"}}
WHICH = {"bench": "model", "kind": "dense", "layers": 8, "rank": 16, "tokens": 4096}


def linear(variant: str, forward: float, backward: float, rank: int = 16) -> dict:
    shape = {"bench": "linear goal", "in": 64, "out": 64, "tokens": 32, "rank": rank}
    overheads = {"forward_overhead": forward, "backward_overhead": backward}
    return shape | {"variant": variant} | overheads


def model(name: str, passes: float, step: float, **ratios: float) -> dict:
    times = {"forward_backward_ms": passes, "step_ms": step, "tokens_per_second": 4.096e6 / step}
    return WHICH | {"name": name} | times | ratios


def section(results: Path, **runs: list[dict]) -> str:
    for number, rows in runs.items():
        folder = results / "NVIDIA-X1" / f"2026-01-02-{number[1:]}"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in (SETTING, *rows))
        (folder / "results.jsonl").write_text(text)
    return gpu_readme.section(results)


def test_readme_has_what_the_command_writes() -> None:
    readme = gpu_readme.README.read_text()
    written = gpu_readme.rewritten(readme, gpu_readme.section(gpu_readme.RESULTS))
    assert readme == written, "run python benchmarks/gpu_readme.py"


def test_numbers_of_a_gpu_come_before_those_of_the_cpu() -> None:
    speed = gpu_readme.README.read_text().split("## Speed and memory")[1]
    assert speed.index(gpu_readme.START) < speed.index("### One CPU thread")


def test_only_what_is_between_the_comments_is_written() -> None:
    readme = f"before\n{gpu_readme.START}\nold\n{gpu_readme.END}\nafter\n"
    expected = f"before\n{gpu_readme.START}\nnew\n{gpu_readme.END}\nafter\n"
    assert gpu_readme.rewritten(readme, "new") == expected


def test_a_line_is_of_the_last_run_that_measured_its_shape(tmp_path: Path) -> None:
    first = [linear("frozen", 0, 0), linear("megalora", 0.9, 0.9), linear("eager", 0.8, 0.8)]
    other = [linear("frozen", 0, 0, 32), linear("megalora", 0.3, 0.4, 32)]
    last = [linear("frozen", 0, 0), linear("megalora", 0.21, 0.343)]
    text = section(tmp_path, r9=first + other, r10=last)
    assert "| rank | megalora |" in text
    assert "| 16 | **21 / 34 %** |" in text
    assert "| 32 | **30 / 40 %** |" in text


def test_whole_steps_are_told_with_their_ratio(tmp_path: Path) -> None:
    rows = [
        model("frozen", 60, 60),
        model("LoRA", 80, 90, over_frozen=1.333, over_full=0.8, step_over_full=0.6),
        model("full", 100, 150),
    ]
    assert (
        "| Llama-3.1-8B, 8 layers, rank 16 | 4,096 | 60 / 80 / 100 ms | 1.33 / 0.80 "
        "| 90 / 150 ms | **0.60** | 45,511 |"
    ) in section(tmp_path, r1=rows)


def test_a_full_model_that_did_not_fit_leaves_its_cells_out(tmp_path: Path) -> None:
    rows = [model("frozen", 60, 60), model("LoRA", 80, 90, over_frozen=1.333)]
    assert "| 60 / 80 ms | 1.33 | 90 ms |  | 45,511 |" in section(tmp_path, r1=rows)
