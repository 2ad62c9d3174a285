"""Of a family without a row Megatron computes all but what `model/not_yet.py` says it lacks."""

import dataclasses

import pytest
import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.heterogeneous.heterogeneous_config import AttentionConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megalora.model.not_yet import LACKS
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.not_yet_cases import CASES
from tests.support.hf_models import IDS, VOCAB, logits

ONE = Layout()
TOLERANCE = 1e-4


@pytest.mark.parametrize("model_type", CASES)
@over(ONE)
def test_what_a_family_has_beside_what_megatron_lacks_is_computed(
    layout: Layout, model_type: str
) -> None:
    case = CASES[model_type]
    assert model_type in LACKS
    with model_parallel(layout):
        chunks = hf.load(layout, case.write(), **case.built)
        chunks[0].config.activation_func = case.activation
        found = hf.logits(chunks, IDS)[..., :VOCAB]
    torch.testing.assert_close(found, logits(case.model()), atol=TOLERANCE, rtol=TOLERANCE)
    for part in case.parts:
        assert (found - logits(case.model(part))).abs().max() > 0.1, f"{part} shows"


@over(ONE)
def test_a_layer_has_no_norm_behind_attention_or_mlp(layout: Layout) -> None:
    fields = [f.name for f in dataclasses.fields(TransformerLayerSubmodules)]
    norms = [name for name in fields if "norm" in name]
    assert norms == ["input_layernorm", "pre_cross_attn_layernorm", "pre_mlp_layernorm"]


@over(ONE)
def test_norms_of_queries_and_keys_are_of_each_head(layout: Layout) -> None:
    with model_parallel(layout):
        [chunk] = hf.load(layout, CASES["gemma3_text"].write(), **CASES["gemma3_text"].built)
    attention = chunk.decoder.layers[0].self_attention
    assert attention.q_layernorm.weight.shape == (chunk.config.kv_channels,)


@over(ONE)
def test_layers_are_of_the_kinds_that_were_known(layout: Layout) -> None:
    assert set("MG*D+-E") == Symbols.VALID_LAYERS
    known = {"no_op", "replace_with_linear", "num_query_groups"}
    assert {f.name for f in dataclasses.fields(AttentionConfig)} == known
