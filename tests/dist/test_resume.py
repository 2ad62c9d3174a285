"""A run that resumes is the run that never stopped, wherever adapters are."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalora.checkpoint.gather import gather_adapters
from tests.dist.support.layouts import Layout, model_parallel, world
from tests.dist.support.resuming import (
    HALF,
    ITERATIONS,
    Cell,
    Resumable,
    differences,
    shared_directory,
)

EXPERTS = ("*.experts.linear_fc1", "*.experts.linear_fc2")
FIRST, LAST = ("decoder.layers.0.*",), ("decoder.layers.1.*",)
PP2, VPP2, EP2, DP2 = Layout(pp=2), Layout(pp=2, vpp=2), Layout(dp=2, ep=2), Layout(dp=2)
PP2_EP2, TP2_PP2 = Layout(pp=2, dp=2, ep=2), Layout(tp=2, sp=True, pp=2)
TP2_SP = Layout(tp=2, sp=True)
TP4, TP2_EP4 = Layout(tp=4, sp=True), Layout(tp=2, sp=True, dp=2, ep=4)
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
    Cell(layout=PP2, targets=("unembed",), flags=f"{DISTRIBUTED} {BF16}"),
    Cell(layout=PP2, targets=("unembed",), flags=SCALES),
    Cell(layout=PP2, targets=("unembed",), lora={"lr_ratio": 4.0}, flags=BF16),
    Cell(layout=PP2, targets=FIRST, flags=f"{DISTRIBUTED} {BF16}"),
    Cell(layout=PP2, kind="experts", model=LATE, targets=EXPERTS, flags=DISTRIBUTED),
    Cell(layout=PP2, kind="experts", model=LATE, flags=BF16),
    Cell(layout=VPP2, kind="dense of 4 layers", targets=("unembed",), flags=DISTRIBUTED),
    Cell(layout=EP2, kind="experts", targets=EXPERTS, flags=DISTRIBUTED),
    Cell(layout=EP2, kind="experts", lora={"dropout": 0.1}),
    Cell(layout=EP2, kind="experts", targets=("router",), flags=BF16),
    Cell(layout=DP2, targets=("unembed",), lora={"eps_b": 1e-3}, flags=DISTRIBUTED),
    Cell(layout=PP2, targets=LAST, flags="--async-save --async-strategy mcore"),
    Cell(layout=PP2_EP2, kind="experts", model=LATE, targets=EXPERTS, flags=BF16),
    Cell(layout=TP2_PP2, targets=("unembed",), flags=DISTRIBUTED),
]


def over_cells(cells: list[Cell]) -> pytest.MarkDecorator:
    """Run a test over cells, each in the world that it needs."""
    params = [pytest.param(cell, id=str(cell), marks=world(cell.layout)) for cell in cells]
    return pytest.mark.parametrize("cell", params)


@over_cells(CELLS)
def test_a_resumed_run_is_the_run_that_never_stopped(cell: Cell, tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    with model_parallel(cell.layout):
        whole = Resumable(cell, directory)
        whole.go_on()
        whole.save()
        history, end = whole.go_on(), whole.state()
        whole.finish_saving()
        resumed = Resumable(cell, directory, seed=5)
        resumed.load()
        assert resumed.iteration == HALF
        assert resumed.go_on() == history
        assert differences(resumed.state(), end) == []


def lose_steps(run: Resumable) -> None:
    for group in run.optimizer.param_groups:
        del group["step"]


def change_a_moment(run: Resumable) -> None:
    (part,) = run.optimizer.chained_optimizers
    next(iter(part.optimizer.state.values()))["exp_avg"].flatten()[0] *= 1 + 1e-6


def draw_a_number(run: Resumable) -> None:
    torch.rand(1)


@pytest.mark.world_1
@pytest.mark.parametrize(
    ("damage", "found"),
    [(lose_steps, "0.0.0.step"), (change_a_moment, "0.0.0.exp_avg"), (draw_a_number, "random")],
)
def test_whatever_a_checkpoint_lost_would_be_seen(
    damage: Callable[[Resumable], None], found: str, tmp_path: Path
) -> None:
    cell = Cell(layout=Layout(), targets=("unembed",))
    with model_parallel(cell.layout):
        whole = Resumable(cell, tmp_path)
        whole.go_on()
        whole.save()
        whole.go_on(1)
        end = whole.state()
        resumed = Resumable(cell, tmp_path)
        resumed.load()
        damage(resumed)
        resumed.go_on(1)
        assert f"{found} on rank 0" in differences(resumed.state(), end)


MOVES = [
    (DP2, Cell(layout=PP2, targets=("unembed",))),
    (PP2, Cell(layout=DP2, targets=("unembed",), flags=f"{DISTRIBUTED} {BF16}")),
    (DP2, Cell(layout=PP2, kind="experts", model=LATE, targets=EXPERTS)),
    (DP2, Cell(layout=EP2, kind="experts")),
    (TP4, Cell(layout=Layout(pp=2, dp=2, vpp=2), kind="dense of 4 layers", flags=DISTRIBUTED)),
    (PP2, Cell(layout=TP2_SP, kind="gated delta nets", flags=DISTRIBUTED)),
    (TP2_EP4, Cell(layout=PP2_EP2, kind="experts", model=LATE, flags=DISTRIBUTED)),
]


@pytest.mark.parametrize(
    ("source", "cell"),
    [pytest.param(*move, id=f"{move[0]} to {move[1]}", marks=world(move[0])) for move in MOVES],
)
def test_a_run_goes_on_where_other_ranks_train(source: Layout, cell: Cell, tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    with model_parallel(source):
        whole = Resumable(dataclasses.replace(cell, layout=source), directory)
        whole.go_on()
        whole.save()
        losses = [loss for loss, *_ in whole.go_on()]
        adapters = gather_adapters(whole.chunks)
    with model_parallel(cell.layout):
        resumed = Resumable(cell, directory, seed=5)
        resumed.load()
        assert {group["step"] for group in resumed.optimizer.param_groups} == {HALF}
        is_half = BF16 in cell.flags
        rel = 2e-3 if is_half else 1e-5
        assert [loss for loss, *_ in resumed.go_on()] == pytest.approx(losses, rel=rel)
        tolerance = 2e-2 if is_half else 1e-4
        for key, tensor in gather_adapters(resumed.chunks).items():
            error = (tensor - adapters[key]).norm() / adapters[key].norm()
            assert error < tolerance, f"{key} differs by {error}"


RATES = "--lr 5e-3 --min-lr 1e-3 --weight-decay 0.05 --adam-eps 1e-4 --train-iters 8"


@over_cells(
    [
        Cell(layout=Layout()),
        Cell(layout=Layout(), flags=f"{DISTRIBUTED} {BF16}"),
        Cell(layout=PP2, targets=("unembed",), flags=BF16),
    ]
)
def test_a_run_goes_on_at_rates_and_epsilons_of_its_flags(cell: Cell, tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    with model_parallel(cell.layout):
        stopped = Resumable(cell, directory)
        stopped.go_on()
        stopped.save()
        # The same run with B in a group of its own, whose rates change on the way.
        whole = Resumable(cell, directory / "none", eps_b=1e-8)
        changed = Resumable(cell, directory / "none", RATES, lr_ratio=2.0, eps_b=1e-3)
        whole.go_on()
        for old, new in zip(
            whole.optimizer.param_groups, changed.optimizer.param_groups, strict=True
        ):
            old |= {key: value for key, value in new.items() if key not in ("params", "step")}
        whole.take_schedule(changed)
        history, end = whole.go_on(), whole.state()
        resumed = Resumable(cell, directory, RATES, lr_ratio=2.0, eps_b=1e-3, seed=5)
        resumed.load()
        assert resumed.go_on() == history
        assert differences(resumed.state(), end) == []


COSINE = "--lr-decay-style cosine"
LATER = "--lr 5e-3 --train-iters 8"


@over_cells([Cell(layout=PP2, targets=("unembed",), flags=COSINE)])
def test_a_schedule_of_another_shape_is_refused_on_every_rank(cell: Cell, tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    with model_parallel(cell.layout):
        Resumable(cell, directory).save()
        message = r"lr_decay_steps \(--lr-decay-iters, .* is 32 but the checkpoint has 16"
        with pytest.raises(ValueError, match=message + ".*--override-opt-param-scheduler"):
            Resumable(cell, directory, LATER).load()


@over_cells([Cell(layout=Layout(), lora={"lr_ratio": 2.0}, flags=COSINE)])
def test_flags_say_whose_schedule_is_followed(cell: Cell, tmp_path: Path) -> None:
    with model_parallel(cell.layout):
        whole = Resumable(cell, tmp_path)
        whole.go_on()
        whole.save()
        history = whole.go_on()
        kept = Resumable(cell, tmp_path, f"{LATER} --use-checkpoint-opt-param-scheduler")
        kept.load()
        assert kept.go_on() == history
        given = Resumable(cell, tmp_path, f"{LATER} --override-opt-param-scheduler")
        given.load()
        # A quarter of a cosine's half wave, at twice the rate for B.
        rate = 5e-3 * (1 + math.cos(math.pi / 4)) / 2
        rates = [group["lr"] for group in given.optimizer.param_groups]
        assert rates == pytest.approx([rate, 2 * rate])


@pytest.mark.world_1
def test_without_an_interval_the_last_iteration_is_saved(tmp_path: Path) -> None:
    cell = Cell(layout=Layout(), targets=("unembed",))
    with model_parallel(cell.layout):
        assert Resumable(cell, tmp_path).args.save_interval == ITERATIONS


@pytest.mark.world_1
def test_a_checkpoint_without_the_number_of_steps_is_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell = Cell(layout=Layout(), targets=("unembed",))
    with model_parallel(cell.layout):
        whole = Resumable(cell, tmp_path)
        whole.go_on(1)
        lose_steps(whole)
        whole.save()
        Resumable(cell, tmp_path).load()
    assert (
        "WARNING: checkpoint does not say how many steps Adam has taken" in capfd.readouterr().out
    )
