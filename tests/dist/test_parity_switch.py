"""Switching adapters off, merging them and taking them out again, in every kind of layout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.merge import merge, unmerge
from megalora.builder import apply_lora, set_enabled
from megalora.checkpoint.state import load_adapters
from tests.dist.support.cases import EP2, ETP2, KINDS, TP2, TP2_EP2, TP2_SP, TP4_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import lora_config, start_values
from tests.dist.support.training import Run, train

KIND_OF = {
    Layout(): "experts",
    TP2: "1 query group",
    TP2_SP: "ungated with biases",
    EP2: "shared-outer experts",
    ETP2: "shared experts",
    TP2_EP2: "experts",
    Layout(pp=2, vpp=2): "dense of 4 layers",
    TP4_SP: "latent attention",
}
LAYOUTS = tuple(KIND_OF)


def adapted(layout: Layout) -> list[Any]:
    chunks = apply_lora(base(layout), lora_config(KIND_OF[layout]))
    load_adapters(chunks, start_values(chunks))
    return chunks


def base(layout: Layout) -> list[Any]:
    return build_model(layout, **KINDS[KIND_OF[layout]].model)


def loss(chunks: list[Any], layout: Layout) -> float:
    """Return the loss of the first batch; the chunks are not to be used again."""
    return float(train(chunks, layout, Run(num_steps=1))[0, 0])


@over(*LAYOUTS)
def test_disabled_adapters_leave_the_base(layout: Layout) -> None:
    with model_parallel(layout):
        plain, active = loss(base(layout), layout), loss(adapted(layout), layout)
        chunks = adapted(layout)
        set_enabled(chunks, False)
        # Megatron multiplies by a frozen weight in another order, so not bit for bit.
        assert loss(chunks, layout) == pytest.approx(plain, rel=1e-6)
        assert abs(active / plain - 1) > 1e-3, "the adapters change too little to be noticed"


@over(*LAYOUTS)
def test_merged_adapters_compute_the_same(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        merge(chunks)
        merged = loss(chunks, layout)
        assert merged == pytest.approx(loss(adapted(layout), layout), rel=2e-6)


@over(*LAYOUTS)
def test_unmerging_restores_the_base(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        before = _weights(chunks)
        merge(chunks)
        assert _distance(_weights(chunks), before) > 1e-3
        unmerge(chunks)
        assert _distance(_weights(chunks), before) < 1e-6


def _weights(chunks: list[Any]) -> list[Tensor]:
    return [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@over(Layout())
def test_merging_twice_is_refused_before_anything_changes(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        with pytest.raises(ValueError, match="not merged: call merge and unmerge in turn"):
            unmerge(chunks)
        merge(chunks)
        merged = _weights(chunks)
        with pytest.raises(ValueError, match="merged already"):
            merge(chunks)
        assert _distance(_weights(chunks), merged) == 0.0


@over(Layout())
def test_tied_embeddings_are_not_merged(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(
            build_model(layout, **KINDS["tied embeddings"].model), lora_config("tied embeddings")
        )
        load_adapters(chunks, start_values(chunks))
        before = _weights(chunks)
        with pytest.raises(ValueError, match="embeddings are tied"):
            merge(chunks)
        assert _distance(_weights(chunks), before) == 0.0


@over(Layout())
def test_a_disabled_adapter_runs_without_gradients(layout: Layout) -> None:
    """The reference policy of RL and DPO: under no_grad, between two trained passes."""
    tokens = torch.arange(8)[None]
    with model_parallel(layout):
        (chunk,) = adapted(layout)
        with torch.no_grad():
            first = chunk(tokens, tokens, None)
            set_enabled([chunk], False)
            reference = chunk(tokens, tokens, None)
            set_enabled([chunk], True)
            again = chunk(tokens, tokens, None)
        assert torch.equal(first, again)
        assert not torch.allclose(first, reference)
        assert not reference.requires_grad
