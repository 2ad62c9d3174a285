"""Megatron's own layers of GLM-5, of TransformerEngine's linears, against those of local ones."""

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec as default_block,
)

import tests.dist.support.models
from tests.dist.support.cases import TP2_SP, Case
from tests.dist.support.layouts import Layout
from tests.dist.support.parity import errors, truth
from tests.dist.test_parity import in_its_world, tolerance
from tests.support.te_on_cpu import kernels_of_torch

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(not te.HAVE_TE, reason="TransformerEngine is not asked for"),
]
KIND = "sparse absorbed attention"
BUILT = {"transformer_impl": "transformer_engine"}
CASES = [
    Case(layout=layout, kind=KIND, fields=BUILT) for layout in (Layout(), TP2_SP, Layout(pp=2))
]


@pytest.mark.parametrize("case", map(in_its_world, CASES))
def test_adapters_on_glm5s_default_layers_train_alike(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels_of_torch():
        # Of Megatron's own layers, and kept.
        truth(case.layout.world_size, case.kind, case.dtype, case.run.answers)
        monkeypatch.setattr(tests.dist.support.models, "sparse_block", default_block)
        found = errors(case)
    assert found["start"] == 0.0
    too_large = {what: e for what, e in found.items() if e > tolerance(torch.float32, what)}
    assert not too_large
