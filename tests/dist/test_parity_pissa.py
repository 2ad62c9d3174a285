"""PiSSA splits the base in every layout: the output stays, adapter plus residual is the base."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.merge import merge
from megalora.adapters.pissa import at_start
from megalora.builder import apply_lora
from megalora.checkpoint.state import gather_adapters
from megalora.config import LoRAConfig
from tests.dist.support.cases import ETP2, KINDS, TP2_EP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import build_model
from tests.dist.support.oracle import projections
from tests.dist.support.parity import Tensors, assemble, largest, relative
from tests.dist.support.training import Run, train

CONFIG = LoRAConfig(rank=4, alpha=6.0, init="pissa")
ONE_STEP = Run(num_steps=1)


def start(layout: Layout, kind: str) -> Tensors:
    with model_parallel(layout):
        return assemble(apply_lora(_build(layout, kind), CONFIG), torch.Tensor.detach)


def _build(layout: Layout, kind: str) -> list[Any]:
    return build_model(layout, **KINDS[kind].model)


@pytest.mark.parametrize("kind", ["experts", "latent attention"])
@over(Layout(), TP2_SP)
def test_pissa_starts_as_the_base(layout: Layout, kind: str) -> None:
    with model_parallel(layout):
        base = train(_build(layout, kind), layout, ONE_STEP)
        split = train(apply_lora(_build(layout, kind), CONFIG), layout, ONE_STEP)
    assert relative(split[:, 0], base[:, 0]) < 1e-6


@over(TP2_SP, TP2_EP2, ETP2)
def test_pissa_starts_the_same_on_every_layout(layout: Layout) -> None:
    alone = start(one_rank(layout), "experts")
    assert largest(start(layout, "experts"), alone) == 0.0


@over(Layout())
def test_pissa_takes_the_leading_singular_values_of_each_projection(layout: Layout) -> None:
    with model_parallel(layout):
        (before,), (after,) = _build(layout, "dense"), apply_lora(_build(layout, "dense"), CONFIG)
    name = "decoder.layers.1.self_attention.linear_qkv"
    whole, residual = (m.get_submodule(name).weight.detach() for m in (before, after))
    owner = torch.tensor(projections("linear_qkv", whole.shape[0], before.config))
    for projection in range(3):
        expected = torch.linalg.svdvals(whole[owner == projection])[CONFIG.rank :]
        left = torch.linalg.svdvals(residual[owner == projection])[: len(expected)]
        torch.testing.assert_close(left, expected)


@over(Layout(), TP2_SP, ETP2)
def test_merging_an_untrained_pissa_adapter_restores_the_base(layout: Layout) -> None:
    with model_parallel(layout):
        expected = dict(_build(layout, "experts")[0].named_parameters())
        (chunk,) = apply_lora(_build(layout, "experts"), CONFIG)
        parameters = dict(chunk.named_parameters())
        name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
        assert relative(parameters[name], expected[name]) > 0.1
        merge([chunk])
        for key, weight in expected.items():
            torch.testing.assert_close(parameters[key], weight)


@over(Layout(), TP2_SP)
def test_the_start_of_a_trained_pissa_adapter_is_remembered(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(_build(layout, "dense"), CONFIG)
        first = _gathered(chunks)
        train(chunks, layout, ONE_STEP)
        trained = _gathered(chunks)
        with at_start(chunks):
            remembered = _gathered(chunks)
        again = _gathered(chunks)
    if torch.distributed.get_rank() == 0:
        assert largest(remembered, first) == 0.0
        assert largest(again, trained) == 0.0
        assert largest(trained, first) > 1e-3


def _gathered(chunks: list[Any]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in gather_adapters(chunks).items()}


@over(Layout())
def test_a_rank_beyond_the_singular_values_is_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = _build(layout, "latent attention")
        before = {name: weight.clone() for name, weight in chunks[0].named_parameters()}
        with pytest.raises(ValueError, match=r"lora_rank 17 exceeds the 16 singular values"):
            apply_lora(chunks, LoRAConfig(rank=17, init="pissa"))
        for name, weight in before.items():
            torch.testing.assert_close(chunks[0].get_parameter(name), weight, rtol=0, atol=0)


@over(Layout())
def test_the_difference_from_the_start_is_an_adapter_of_the_original_base(layout: Layout) -> None:
    name = "decoder.layers.0.self_attention.linear_proj"
    with model_parallel(layout):
        original = _build(layout, "dense")[0].get_submodule(name).weight.detach()
        chunks = apply_lora(_build(layout, "dense"), CONFIG)
        train(chunks, layout, ONE_STEP)
        trained = _gathered(chunks)
        with at_start(chunks):
            first = _gathered(chunks)
        merge(chunks)
        merged = chunks[0].get_submodule(name).weight.detach()
    keys = [f"{name}_lora.lora_{factor}" for factor in "AB"]
    (a, b), (a0, b0) = ([tensors[key] for key in keys] for tensors in (trained, first))
    # Of rank 2 r, as it is exported.
    update = torch.cat([b, -b0], 1) @ torch.cat([a, a0])
    assert relative(merged - original, CONFIG.alpha / CONFIG.rank * update) < 1e-5
