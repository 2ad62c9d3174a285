"""A new kind of adapter is one class: its shards, gradients, checkpoints and merging follow."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.factors import Axis, Factor
from megalora.adapters.kinds import KINDS, LoRA
from megalora.adapters.merge import merge
from megalora.adapters.start import draw_uniform
from megalora.builder import apply_lora
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.checkpoint.read import read_adapter_checkpoint
from megalora.config import LoRAConfig
from tests.dist.support import cases, parity
from tests.dist.support.cases import ETP2, TP2_SP, Case, Kind
from tests.dist.support.layouts import Layout, model_parallel, over, world
from tests.dist.support.models import build_model
from tests.dist.support.oracle import Oracle, Tensors
from tests.dist.support.parity import errors, largest, lora_config, start_values
from tests.dist.support.resuming import HALF, Cell, Resumable, shared_directory
from tests.dist.support.training import Run, train


def draw_near_one(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return 1 + draw_uniform(f"{name}.scale", shape, seed)


class Scaled(LoRA):
    """LoRA with a trained scale of each output: y += g * (c B A x)."""

    factors = (*LoRA.factors, Factor("lora_scale", (Axis.OUTPUT,), draw_near_one))

    def pair(self, own: Mapping[str, torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
        a, b = super().pair(own)
        return a, own["lora_scale"][..., None] * b


class ScaledOracle(Oracle):
    """The whole model with W + c diag(g) B A in plain torch."""

    def weights(self) -> Tensors:
        own = self.factors
        self.factors = {
            key: own[key.replace("lora_B", "lora_scale")][..., None] * factor
            if key.endswith("lora_B")
            else factor
            for key, factor in own.items()
        }
        try:
            return super().weights()
        finally:
            self.factors = own


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "scaled", Scaled())
    monkeypatch.setattr(parity, "Oracle", ScaledOracle)
    for name in ("dense", "experts", "hybrid"):
        kind = cases.KINDS[name]
        made = Kind(kind.model, {**kind.lora, "kind": "scaled"})
        monkeypatch.setitem(cases.KINDS, f"scaled {name}", made)


CASES = [
    Case(layout=Layout(), kind="scaled dense"),
    Case(layout=TP2_SP, kind="scaled dense", **cases.FUSED),
    Case(layout=ETP2, kind="scaled experts"),
    Case(layout=TP2_SP, kind="scaled hybrid"),
]


def over_cases(chosen: list[Case]) -> pytest.MarkDecorator:
    """Run a test over cases, each in the world that it needs."""
    params = [pytest.param(case, id=str(case), marks=world(case.layout)) for case in chosen]
    return pytest.mark.parametrize("case", params)


@over_cases(CASES)
def test_a_new_kind_trains_as_in_the_unsharded_model(case: Case) -> None:
    found = errors(case)
    assert found["start"] == 0.0
    # Adam makes whole steps of small gradients: a hybrid's are off by 1e-5 on unsharded ranks too.
    rounding = {"weights": 5e-5}
    too_large = {what: e for what, e in found.items() if e > rounding.get(what, 1e-5)}
    assert not too_large


@over_cases(CASES[1:2])
def test_a_wrong_pair_would_be_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "scaled", type("Unscaled", (Scaled,), {"pair": LoRA.pair})())
    assert errors(case)["loss"] > 1e-4


@over(ETP2)
def test_a_merged_new_kind_computes_the_same(layout: Layout) -> None:
    kind = "scaled experts"

    def loss(*, merged: bool) -> float:
        chunks = apply_lora(build_model(layout, **cases.KINDS[kind].model), lora_config(kind))
        load_adapters(chunks, start_values(chunks))
        if merged:
            merge(chunks)
        return float(train(chunks, layout, Run(num_steps=1))[0, 0])

    with model_parallel(layout):
        assert loss(merged=True) == pytest.approx(loss(merged=False), rel=2e-6)


@pytest.mark.world_2
def test_a_new_kind_goes_on_and_is_read_at_another_tensor_parallel_size(tmp_path: Path) -> None:
    directory = shared_directory(tmp_path)
    cell = Cell(layout=TP2_SP, kind="scaled dense", flags="--use-distributed-optimizer")
    with model_parallel(cell.layout):
        sharded = Resumable(cell, directory)
        sharded.go_on()
        sharded.save()
        saved = _gathered(sharded)
        losses = [loss for loss, *_ in sharded.go_on()]
        end = _gathered(sharded)
    with model_parallel(Layout(dp=2)):
        alone = Resumable(dataclasses.replace(cell, layout=Layout(dp=2)), directory, seed=5)
        alone.load()
        assert alone.iteration == HALF
        loaded = _gathered(alone)
        assert [loss for loss, *_ in alone.go_on()] == pytest.approx(losses, rel=1e-5)
        trained = _gathered(alone)
    read, config, _ = read_adapter_checkpoint(directory)
    if dist.get_rank() == 0:
        assert config.kind == "scaled"
        assert any(key.endswith("linear_fc1_lora.lora_scale") for key in saved)
        assert largest(loaded, saved) == largest(read, saved) == 0.0
        assert largest(trained, end) < 1e-4 < largest(trained, saved)


def _gathered(run: Resumable) -> Tensors:
    return {key: tensor.clone() for key, tensor in gather_adapters(run.chunks).items()}


@over(Layout())
def test_a_run_of_another_kind_is_refused(layout: Layout, tmp_path: Path) -> None:
    with model_parallel(layout):
        Resumable(Cell(layout=layout, lora={"kind": "scaled"}), tmp_path).save()
        with pytest.raises(ValueError, match="lora_kind is 'lora' but the checkpoint has 'scaled'"):
            Resumable(Cell(layout=layout), tmp_path).load()


@over(Layout())
def test_an_unknown_kind_is_refused_with_those_that_are(layout: Layout) -> None:
    with model_parallel(layout):
        chunks: list[Any] = build_model(layout)
        with pytest.raises(ValueError, match=r"lora_kind is 'dora': it must be one of \['lora'"):
            apply_lora(chunks, LoRAConfig(rank=4, kind="dora"))
