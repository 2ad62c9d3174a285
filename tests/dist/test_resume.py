"""A run that resumes is the run that never stopped, wherever adapters are."""

from pathlib import Path

import pytest

from tests.dist.layouts import Layout, model_parallel
from tests.dist.resuming import HALF, Cell, Resumable, differences, shared_directory

EXPERTS = ("*.experts.linear_fc1", "*.experts.linear_fc2")
FIRST, LAST = ("decoder.layers.0.*",), ("decoder.layers.1.*",)
PP2, VPP2, EP2, DP2 = Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2, ep=2), Layout(dp=2)
PP2_EP2 = Layout(pp=2, dp=2, ep=2)
DISTRIBUTED, BF16, FP16 = "--use-distributed-optimizer", "--bf16", "--fp16"
# Experts in the last stage alone.
LATE = {"num_layers": 2, "moe_layer_freq": [0, 1]}
# The first step overflows, and a later one raises the scale; with 2^32, all do.
SCALES = "--fp16 --initial-loss-scale 16384 --loss-scale-window 2 --hysteresis 1"
CELLS = [
    Cell(layout=Layout(), flags=SCALES),
    Cell(layout=Layout(), flags=FP16),
    Cell(layout=Layout(), flags=f"{FP16} {DISTRIBUTED}"),
    Cell(layout=Layout(), lora={"dropout": 0.1}, flags=BF16),
    Cell(layout=Layout(), lora={"lr_ratio": 4.0, "eps_b": 1e-3}),
    Cell(layout=Layout(), lora={"eps_b": 1e-3}),
    Cell(layout=Layout(), lora={"eps_b": 1e-3}, flags=DISTRIBUTED),
    Cell(layout=Layout(), kind="experts", targets=EXPERTS),
    Cell(layout=Layout(), kind="experts", targets=EXPERTS, flags=SCALES),
    Cell(layout=Layout(), kind="experts", targets=("router",), flags=DISTRIBUTED),
    Cell(layout=PP2, targets=("unembed",)),
    Cell(layout=PP2, targets=("unembed",), flags=DISTRIBUTED),
    Cell(layout=PP2, targets=("unembed",), flags=BF16),
    Cell(layout=PP2, targets=("unembed",), flags=f"{DISTRIBUTED} {BF16}"),
    Cell(layout=PP2, targets=("unembed",), flags=SCALES),
    Cell(layout=PP2, targets=("unembed",), lora={"lr_ratio": 4.0}, flags=BF16),
    Cell(layout=PP2, targets=FIRST),
    Cell(layout=PP2, targets=FIRST, flags=f"{DISTRIBUTED} {BF16}"),
    Cell(layout=PP2, targets=LAST, flags=BF16),
    Cell(layout=PP2, kind="experts", model=LATE, targets=EXPERTS),
    Cell(layout=PP2, kind="experts", model=LATE, targets=EXPERTS, flags=DISTRIBUTED),
    Cell(layout=PP2, kind="experts", model=LATE, flags=BF16),
    Cell(layout=VPP2, kind="dense of 4 layers", targets=("decoder.layers.3.*",)),
    Cell(layout=VPP2, kind="dense of 4 layers", targets=("unembed",), flags=DISTRIBUTED),
    Cell(layout=EP2, kind="experts", targets=EXPERTS, flags=BF16),
    Cell(layout=EP2, kind="experts", targets=EXPERTS, flags=DISTRIBUTED),
    Cell(layout=EP2, kind="experts", lora={"dropout": 0.1}),
    Cell(layout=EP2, kind="experts", targets=("router",)),
    Cell(layout=DP2, targets=("unembed",), lora={"eps_b": 1e-3}, flags=DISTRIBUTED),
    Cell(layout=Layout(tp=2, sp=True), targets=("unembed",), flags=BF16),
    Cell(layout=PP2_EP2, kind="experts", model=LATE, targets=EXPERTS, flags=BF16),
    Cell(layout=PP2_EP2, kind="experts", model=LATE, flags=DISTRIBUTED),
    Cell(layout=Layout(tp=2, sp=True, pp=2), targets=("unembed",), flags=DISTRIBUTED),
]


def over_cells(cells: list[Cell]) -> pytest.MarkDecorator:
    """Run a test over cells, each in the world that it needs."""
    return pytest.mark.parametrize(
        "cell",
        [
            pytest.param(
                cell, id=str(cell), marks=getattr(pytest.mark, f"world_{cell.layout.world_size}")
            )
            for cell in cells
        ],
    )


@over_cells(CELLS)
def test_a_resumed_run_is_the_run_that_never_stopped(cell: Cell, tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    with model_parallel(cell.layout):
        whole = Resumable(cell, directory)
        whole.go_on()
        whole.save()
        history, end = whole.go_on(), whole.state()
        resumed = Resumable(cell, directory, seed=5)
        resumed.load()
        assert resumed.iteration == HALF
        assert resumed.go_on() == history
        assert differences(resumed.state(), end) == []
