"""The library chooses by what was measured: csrc/cuda/choices.h, made from benchmarks/results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import choose

SETTING = {"device": "NVIDIA X1", "capability": 95}


def row(variant: str, forward: float, **other: object) -> dict:
    shape = {"in": 64, "out": 64, "tokens": 32, "rank": 16, "p": 0.0, "segments": "-"}
    numbers = {"forward_overhead": forward, "backward_overhead": 0.5, "both_overhead": 0.4}
    return {"bench": "linear goal", "form": "plain", "variant": variant} | shape | numbers | other


def write_run(results: Path, name: str, *rows: dict) -> None:
    folder = results / "NVIDIA-X1" / name
    folder.mkdir(parents=True)
    lines = [json.dumps(line) for line in ({"setting": SETTING}, *rows)]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


def routes(results: Path) -> dict[tuple[str, bool, int], str]:
    found = choose.choices(results)
    return {(choice.product, choice.several, choice.rank_class): choice.route for choice in found}


def compiles(assertions: list[str]) -> None:
    """Fail unless assertions about the checked-in table hold, by the compiler's word."""
    lines = ['#include "choices.h"', "using namespace megalora::cuda;"]
    lines += [f"static_assert({assertion});" for assertion in assertions]
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-I{choose.HEADER.parent}", "-x", "c++", "-"]
    finished = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def lookup(device: str, capability: int, product: str, several: bool, rank: int) -> str:
    measured = f'measured_as(kChoices, "{device}", {capability})'
    return f'fastest(kChoices, {measured}, "{product}", {str(several).lower()}, {rank})'


# === The header that is checked in ===


def test_the_header_is_what_the_results_say() -> None:
    expected = choose.header(choose.choices(choose.RESULTS))
    assert choose.HEADER.read_text() == expected, "run python benchmarks/choose.py"


def test_an_h200_updates_by_our_kernel_up_to_the_ranks_where_cublas_is_faster() -> None:
    kernels = [(False, 1), (False, 4), (False, 16), (False, 32), (True, 1), (True, 8), (True, 16)]
    others = [(False, 33), (False, 64), (False, 256), (True, 32)]
    compiles(
        [f"{lookup('NVIDIA H200', 90, 'update', *at)} == Route::kernels" for at in kernels]
        + [f"{lookup('NVIDIA H200', 90, 'update', *at)} != Route::kernels" for at in others]
    )


def test_an_h200_reads_dy_once_up_to_rank_16() -> None:
    compiles(
        [
            f"({lookup('NVIDIA H200', 90, 'backward', several, rank)} == Route::kernels)"
            f" == {str(rank <= 16).lower()}"
            for several in (False, True)
            for rank in (1, 8, 16, 24, 32, 64)
        ]
    )


def test_a_device_of_the_same_capability_gets_the_choices_of_a_measured_one() -> None:
    compiles([f"{lookup('NVIDIA H100 PCIe', 90, 'update', True, 16)} == Route::kernels"])


def test_a_device_without_results_gets_the_default() -> None:
    compiles(
        [
            f"{lookup('NVIDIA A100', 80, product, several, 1)} == Route::automatic"
            for product in ("project", "update", "outer", "backward")
            for several in (False, True)
        ]
    )


def test_no_gpu_takes_the_pass_of_a_gated_mlp_before_one_is_measured_to_be_faster() -> None:
    devices = [("NVIDIA H200", 90), ("NVIDIA A100", 80), ("NVIDIA B200", 100)]
    at = [(*device, rank) for device in devices for rank in (1, 16, 32)]
    names = [lookup(device, capability, "gate", True, rank) for device, capability, rank in at]
    compiles([f"{name} != Route::kernels" for name in names])


# === How results become choices ===


def test_an_mlp_decides_whether_its_pass_is_taken(tmp_path: Path) -> None:
    rows = [row("megalora, gate:gemm", 0.3), row("megalora, gate:kernels", 0.3)]
    alike = {"bench": "mlp", "segments": "64+64"}
    numbers = [alike | {"both_overhead": value} for value in (0.3, 0.2)]
    write_run(tmp_path, "2026-01-01-1", *(r | n for r, n in zip(rows, numbers, strict=True)))
    assert routes(tmp_path) == {("gate", True, 16): "kernels"}


def test_a_new_route_of_a_product_needs_no_edit(tmp_path: Path) -> None:
    named = {"gemm": 0.22, "kernels": 0.24, "hopper": 0.15}
    rows = [row(f"megalora, update:{route}", value) for route, value in named.items()]
    write_run(tmp_path, "2026-01-01-1", *rows, row("megalora", 0.1), row("addmm", 0.01))
    assert routes(tmp_path) == {("update", False, 16): "hopper"}
    text = choose.header(choose.choices(tmp_path))
    assert '{"NVIDIA X1", 95, "update", false, 16, Route::hopper},' in text
    assert "gemm 22.0 %, hopper 15.0 %, kernels 24.0 %: 2026-01-01-1" in text


def test_what_is_faster_by_no_more_than_noise_is_not_chosen(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        "2026-01-01-1",
        row("megalora, project:gemm", 0.22),
        row("megalora, project:kernels", 0.213),
    )
    assert routes(tmp_path) == {("project", False, 16): "gemm"}


def test_a_later_run_decides_anew_and_half_a_comparison_decides_nothing(tmp_path: Path) -> None:
    fast, slow = "megalora, update:kernels", "megalora, update:gemm"
    write_run(tmp_path, "2026-01-01-9", row(fast, 0.3), row(slow, 0.2))
    write_run(tmp_path, "2026-01-01-10", row(fast, 0.1), row(slow, 0.2))
    write_run(tmp_path, "2026-01-01-11", row(fast, 0.9))
    write_run(tmp_path, "2026-01-01-11-before", row(fast, 0.3), row(slow, 0.2))
    assert routes(tmp_path) == {("update", False, 16): "kernels"}


def test_shapes_of_one_class_are_averaged(tmp_path: Path) -> None:
    rows = []
    for rank, kernels in ((4, 0.30), (1, 0.10)):
        rows += [row("megalora, update:gemm", 0.22, rank=rank)]
        rows += [row("megalora, update:kernels", kernels, rank=rank)]
    write_run(tmp_path, "2026-01-01-1", *rows)
    assert routes(tmp_path) == {("update", False, 1): "kernels"}


@pytest.mark.parametrize("other", [{"p": 0.1}, {"form": "main_grad"}, {"bench": "experts"}])
def test_what_cublas_cannot_compute_is_no_comparison(tmp_path: Path, other: dict) -> None:
    rows = [row("megalora, update:gemm", 0.3), row("megalora, update:kernels", 0.1)]
    write_run(tmp_path, "2026-01-01-1", *(line | other for line in rows))
    assert routes(tmp_path) == {}


def test_the_classes_of_ranks_are_those_of_the_library() -> None:
    compiles([f"rank_class({rank}) == {choose.rank_class(rank)}" for rank in range(1, 130)])
