"""The CUDA kernels without a GPU: run by an emulator on CPU, and looked at in the built library.

The emulator (tests/emulator) runs each thread of a block as a fiber and follows the PTX ISA for the
warp instructions. It says whether the kernels are right, nothing about their speed.
"""

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from megalora.built import read_built
from megalora.ops import Ops, reference
from megalora.ops.fused import load
from tests.support import gated_cases
from tests.support.op_cases import (
    CASES,
    TOLERANCE,
    Case,
    assert_matches_reference,
    draw,
    relative_error,
)

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests/emulator"


@pytest.fixture(scope="module")
def emulated_library() -> Path:
    """Compile the kernels as C++ with the emulator in place of CUDA, unless that is done."""
    target = ROOT / "build/emulated.so"
    sources = [*ROOT.glob("csrc/**/*.*"), *EMULATOR.iterdir()]
    newest = max(path.stat().st_mtime for path in sources)
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(exist_ok=True)
        command = ["c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-DMEGALORA_EMULATE"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
        # It takes a jump to another fiber's stack for an error.
        command += ["-U_FORTIFY_SOURCE"]
        command += [f"-I{path}" for path in (EMULATOR, *include_paths())]
        command += [str(EMULATOR / "emulated.cpp"), str(ROOT / "csrc/tensor.cpp")]
        command += ["-o", str(target)]
        command += [f"-L{path}" for path in library_paths()]
        command += ["-ltorch", "-ltorch_cpu"]
        subprocess.run(command, check=True)
    torch.ops.load_library(target)
    return target


@pytest.fixture
def emulated(emulated_library: Path) -> Ops:
    """Return the compiled ops with the kernels of csrc/cuda behind them."""
    return cast(Ops, torch.ops.megalora_emulated)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_matches_the_reference(emulated: Ops, case: Case) -> None:
    assert_matches_reference(emulated, case, torch.bfloat16, 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[9]], ids=str)
def test_every_kernel_matches_the_reference_in_other_dtypes(
    emulated: Ops, case: Case, dtype: torch.dtype
) -> None:
    assert_matches_reference(emulated, case, dtype, 0.0)


def test_splitting_the_tokens_of_a_dense_gradient_changes_little(emulated: Ops) -> None:
    """1100 tokens are summed in three splits, whose workspace starts with garbage."""
    assert_matches_reference(emulated, Case(1100, 8, (8,), 1, rank=1), torch.float32, 0.3)


@pytest.mark.parametrize(
    "case",
    [
        Case(200, 8, (600, 70), 2, rank=12),  # several groups of column tiles for one projection
        Case(300, 8, (300,), 1, rank=30),
        Case(400, 8, (130, 600), 1, rank=3, experts=3),  # experts of several blocks
    ],
    ids=str,
)
def test_one_read_of_dy_gives_both_gradients(emulated: Ops, case: Case) -> None:
    assert_matches_reference(emulated, case, torch.bfloat16, 0.0)


WHOLE_TILES = [
    Case(128, 1088, (640,), 1, rank=16),  # whole tiles; two splits of the columns of x
    Case(70, 1030, (72, 40), 1, rank=3),  # ragged tiles in two splits
    Case(320, 256, (256, 256), 1, rank=4, experts=3),  # rows of 8 bytes
    Case(256, 64, (576,), 1, rank=32),
    Case(130, 72, (320,), 1, rank=70),  # several steps of ranks before wide is added to
]
# The last one shorter. Large, so with dropout alone, which has every step that there is without.
THREE_SPLITS = Case(192, 1600, (320, 64), 2, rank=64)


@pytest.mark.parametrize(
    ("case", "p"),
    [*itertools.product(WHOLE_TILES, (0.0, 0.3)), (THREE_SPLITS, 0.3)],
    ids=str,
)
def test_whole_tiles_pass_through_every_stage(emulated: Ops, case: Case, p: float) -> None:
    assert_matches_reference(emulated, case, torch.bfloat16, p)


@pytest.mark.parametrize(
    "case",
    [Case(128, 1088, (320,), 1, rank=16), Case(70, 1030, (72, 40), 1, rank=3)],
    ids=str,
)
def test_splits_of_columns_are_added_in_fp32(emulated: Ops, case: Case) -> None:
    assert_matches_reference(emulated, case, torch.float32, 0.0)


def test_gradients_at_odd_addresses_are_added_to(emulated: Ops) -> None:
    """A view that begins one element after a multiple of 16 bytes cannot be written in fours."""
    given = draw(Case(200, 8, (96,), 1, rank=8), torch.bfloat16)
    arguments = (given.y, given.s, given.lora_B, 0.7, None, [])
    _, expected = reference.expand_backward(*arguments)
    d_b = torch.zeros(1 + expected.numel())[1:].view_as(expected)
    emulated.expand_backward_(d_b, *arguments)
    assert relative_error(d_b, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("more", [5, 8], ids=["odd", "whole vectors"])
def test_columns_before_others_are_read_and_written_alone(emulated: Ops, more: int) -> None:
    """As of a delta net's in_proj, whose last columns have no adapter."""
    given = draw(Case(70, 8, (24, 24, 40, 40), 1, rank=4), torch.bfloat16)
    wide = torch.cat([given.y, torch.ones(70, more, dtype=torch.bfloat16)], 1).view(10, 7, -1)
    columns, s = wide[..., :128], given.s.view(10, 7, -1)
    arguments = (s, given.lora_B, 0.7, None, given.segments)
    found = emulated.expand_backward(columns, *arguments)
    for gradient, right in zip(found, reference.expand_backward(columns, *arguments), strict=True):
        assert relative_error(gradient, right) < TOLERANCE[torch.bfloat16]
    expected = columns.clone()
    reference.expand_(expected, *arguments)
    emulated.expand_(columns, *arguments)
    assert relative_error(wide[..., :128], expected) < TOLERANCE[torch.bfloat16]
    assert wide[..., 128:].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", gated_cases.KERNEL_CASES, ids=str)
def test_the_pass_of_a_gated_mlp_matches_the_reference(
    emulated: Ops, case: gated_cases.Case, dtype: torch.dtype
) -> None:
    gated_cases.assert_gated_matches_reference(emulated, gated_cases.draw(case, dtype))


@pytest.mark.parametrize("case", [c for c in gated_cases.KERNEL_CASES if not c.ends], ids=str)
def test_the_node_of_a_gated_mlp_is_that_of_merged_weights(
    emulated: Ops, case: gated_cases.Case
) -> None:
    given = gated_cases.draw(case, torch.bfloat16)
    gated_cases.assert_node_is_of_merged_weights(emulated, given)


def test_gates_that_saturate_are_finite(emulated: Ops) -> None:
    given = gated_cases.draw(gated_cases.KERNEL_CASES[1], torch.bfloat16, spread=1e4)
    gated_cases.assert_gated_matches_reference(emulated, given)


def test_the_kernels_repeat_themselves_bit_for_bit(emulated: Ops) -> None:
    given = draw(CASES[7], torch.bfloat16)
    arguments = (given.y, given.s, given.lora_B, 1.0, given.offsets, given.segments)
    first, second = emulated.expand_backward(*arguments), emulated.expand_backward(*arguments)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


# === The built library ===


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """Return cuobjdump of the CUDA toolkit or of triton; skip where there is nothing to look at."""
    load()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("megalora::shrink", "CUDA"):
        pytest.skip("the library is built for the CPU only")
    triton = importlib.util.find_spec("triton")
    beside = (
        [Path(path) / "backends/nvidia/bin" for path in triton.submodule_search_locations or []]
        if triton
        else []
    )
    found = shutil.which("cuobjdump") or next(
        (str(folder / "cuobjdump") for folder in beside if (folder / "cuobjdump").exists()), None
    )
    if found is None:
        pytest.skip("cuobjdump is neither in PATH nor beside triton")
    return found


def dump(cuobjdump: str, *options: str) -> str:
    """Return what cuobjdump says about the library."""
    command = [cuobjdump, *options, str(ROOT / "megalora/_C.so")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_no_kernel_spills_registers(cuobjdump: str) -> None:
    usage = re.findall(
        r"Function (\S+):\n\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", dump(cuobjdump, "-res-usage")
    )
    kernels = [name for name, _, _ in usage if "kernel" in name]
    assert len(kernels) % 3 == 0, "three architectures"
    assert len(kernels) >= 3 * 40
    assert {(stack, local) for _, stack, local in usage} == {("0", "0")}


# What compiles, and does nothing, for another architecture than its own.
EMPTY = 4


def test_registers_are_those_of_the_written_table(cuobjdump: str) -> None:
    """More of them are fewer blocks on a multiprocessor: a change of that is to be seen."""
    about = read_built(ROOT / "megalora/_C.so")
    if about is None or about.cuda // 10 != 1300:
        pytest.skip("the table is of nvcc 13.0: another compiler gives other numbers")
    page = (ROOT / "docs/ops.md").read_text()
    rows = re.findall(
        r"^\| `(\w+_kernel)`[^|]*\| (\d*) ?\| (\d*) ?\| (\d*) ?\|$", page, re.MULTILINE
    )
    names = ("sm_80", "sm_90a", "sm_100a")
    written = {
        (kernel, name): int(count)
        for kernel, *counts in rows
        for name, count in zip(names, counts, strict=True)
        if count
    }
    built: dict[tuple[str, str], int] = {}
    for part in dump(cuobjdump, "-res-usage").split("\narch = ")[1:]:
        for kernel, count in re.findall(r"Function \S*?\d([a-z_]+_kernel)\S*:\n\s+REG:(\d+)", part):
            place = (kernel, part.split()[0])
            built[place] = max(built.get(place, 0), int(count))
    assert {place: count for place, count in built.items() if count > EMPTY} == written


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_the_kernels_use_tensor_cores(cuobjdump: str, architecture: str) -> None:
    elfs = dump(cuobjdump, "-lelf")
    assert len(re.findall(rf"\.{architecture}\.cubin", elfs)) == 8, (
        "project, update, outer, backward, gated, add, block_diagonal, linear"
    )
    if architecture == "sm_90a":  # one listing stands for all: it takes seconds
        listing = dump(cuobjdump, "-sass", "-arch", architecture)
        kernels = re.split(r"^\s+Function : ", listing, flags=re.MULTILINE)[1:]
        one_launch = "".join(kernel for kernel in kernels if "linear_kernel" in kernel.split()[0])
        products = "".join(kernel for kernel in kernels if "linear_kernel" not in kernel.split()[0])
        for instruction in (
            "HMMA.16816.F32.BF16",
            "HMMA.16816.F32 ",
            "LDSM",
            "LDGSTS.E",
            "LDG.E.128",
            "STG.E.128",
        ):
            assert instruction in products
        for instruction in ("HGMMA.64x256x16.F32.BF16", "UTMALDG.2D.MULTICAST", "UTMASTG.2D"):
            assert instruction in one_launch
        assert "CALL." not in listing, "a division in 64 bits is called, and slow"
        # Those of the one launch count what is done, not sums.
        assert not re.search(r"\b(RED|ATOM)\b", products), "an atomic sum is not deterministic"
