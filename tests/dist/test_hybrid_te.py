"""Megatron's default hybrid model, of TransformerEngine's layers, against one of Megatron's own."""

import copy
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

from megalora.mends.attention import CoreAttention
from tests.dist.support import hf, models
from tests.dist.support.cases import EP2, TP2, TP2_SP, Case
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.parity import errors, truth
from tests.dist.test_hf_base import TOLERANCE, reference
from tests.dist.test_parity import in_its_world, tolerance
from tests.support import hf_models
from tests.support.te_on_cpu import kernels_of_torch

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(not te.HAVE_TE, reason="TransformerEngine is not asked for"),
]
GROUPED = {"moe_grouped_gemm": True}
CASES = [
    *(Case(layout=layout, kind="hybrid") for layout in (Layout(), TP2, TP2_SP, Layout(pp=2))),
    *(
        Case(layout=layout, kind="hybrid with experts", fields=GROUPED)
        for layout in (Layout(), EP2)
    ),
]


@pytest.mark.parametrize("case", map(in_its_world, CASES))
def test_adapters_on_the_default_layers_train_alike(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels_of_torch():
        # Of Megatron's own layers, and kept.
        truth(case.layout.world_size, case.kind, case.dtype, case.run.answers)
        monkeypatch.setattr(models, "STACK", default_stack())
        monkeypatch.setattr(models, "HYBRID_LAYERS", {})
        found = errors(case)
    assert found["start"] == 0.0
    too_large = {what: e for what, e in found.items() if e > tolerance(torch.float32, what)}
    assert not too_large


@pytest.mark.parametrize("case", ["llama", "qwen3_moe-mixed", "glm4_moe", "deepseek_v3"])
@over(Layout(), TP2_SP)
def test_the_default_layers_have_the_logits_of_transformers(
    layout: Layout, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, expected = reference(case)
    monkeypatch.setattr(models, "STACK", default_stack())
    monkeypatch.setattr(models, "HYBRID_LAYERS", GROUPED)
    with kernels_of_torch(), model_parallel(layout):
        chunks = hf.load(layout, directory, hybrid=True)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def default_stack() -> Any:
    """Return the default layers, all but attention's kernel."""
    spec = copy.deepcopy(hybrid_stack_spec)
    for layer in (spec.submodules.attention_layer, spec.submodules.mla_layer):
        layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec
