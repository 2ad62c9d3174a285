"""Numbers of GPUs in docs and README are those of the results, and nobody types them."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.forked import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_numbers
from _pages import rewritten, start

SETTING = {"setting": {"device": "NVIDIA X1", "date": "2026-01-02"}}
WHICH = {"bench": "model", "kind": "dense", "layers": 8, "rank": 16, "tokens": 4096}


def linear(variant: str, forward: float, backward: float, rank: int = 16) -> dict:
    shape = {"bench": "linear goal", "in": 64, "out": 64, "tokens": 32, "rank": rank}
    overheads = {"forward_overhead": forward, "backward_overhead": backward}
    return shape | {"variant": variant} | overheads


def model(name: str, passes: float, step: float, **ratios: float) -> dict:
    times = {"forward_backward_ms": passes, "step_ms": step, "tokens_per_second": 4.096e6 / step}
    return WHICH | {"name": name} | times | ratios


def written(results: Path, runs: dict[str, list[dict]]) -> None:
    for number, rows in runs.items():
        folder = results / "NVIDIA-X1" / f"2026-01-02-{number[1:]}"
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in (SETTING, *rows))
        (folder / "results.jsonl").write_text(text)


def section(results: Path, **runs: list[dict]) -> str:
    written(results, runs)
    return gpu_numbers.section(results)


def test_the_page_has_what_the_command_writes() -> None:
    page = gpu_numbers.PAGE.read_text()
    text = gpu_numbers.section(gpu_numbers.RESULTS)
    assert page == rewritten(page, gpu_numbers.COMMAND, text), f"run python {gpu_numbers.COMMAND}"


def test_readme_has_what_the_command_writes() -> None:
    readme = gpu_numbers.README.read_text()
    text = gpu_numbers.summary(gpu_numbers.RESULTS)
    expected = rewritten(readme, gpu_numbers.COMMAND, text)
    assert readme == expected, f"run python {gpu_numbers.COMMAND}"


def test_numbers_of_a_gpu_come_before_those_of_the_cpu() -> None:
    page = gpu_numbers.PAGE.read_text()
    assert page.index(start(gpu_numbers.COMMAND)) < page.index("## On one CPU thread")


def test_only_what_is_between_the_comments_is_written() -> None:
    page = "before\n<!-- From here by a.py. -->\n{}\n<!-- To here. -->\nafter\n"
    assert rewritten(page.format("old"), "a.py", "new") == page.format("new")


def test_a_page_without_the_comments_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"no place for what a\.py writes"):
        rewritten("before\n<!-- From here by b.py. -->\nold\n<!-- To here. -->\n", "a.py", "new")


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


def test_the_summary_has_each_peer_beside_megalora_and_whole_steps_alone(tmp_path: Path) -> None:
    linears = [linear("frozen", 0, 0), linear("megalora", 0.041, 0.114), linear("eager", 0.8, 0.9)]
    floor = [linear("floor", 0.01, 0.02)]
    steps = [
        model("frozen", 60, 60),
        model("LoRA", 80, 90, over_frozen=1.3),
        model("full", 99, 150),
    ]
    written(tmp_path, {"r1": linears + floor + steps})
    lines = gpu_numbers.summary(tmp_path).splitlines()
    assert lines[2].endswith("over frozen | **4 / 11 %** | eager 80 / 90 % |")
    assert lines[3:] == [
        "| Llama-3.1-8B, 8 layers, rank 16, 4,096 tokens: a whole step "
        "| **90 ms**, 45,511 tokens/s | full fine-tuning 150 ms |"
    ]
