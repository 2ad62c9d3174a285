"""Gated delta nets and gated attention between Hugging Face and Megatron: each part of it shows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megalora.checkpoint.gather import gather_adapters
from megalora.config import LoRAConfig
from megalora.hf import cuts, fused, weights
from megalora.hf.adapters import to_hf
from megalora.hf.base_out import save_hf_base
from megalora.model.config_json import model_shape, read_config
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.test_hf_adapters import CONFIG, RANKS, adapted, build, put, shared_directory
from tests.dist.test_hf_base import ONE, TOLERANCE, reference
from tests.support import hf_models

BOTH = ["qwen3_next", "qwen3_5_text"]
query_groups, delta_blocks = cuts.query_groups, cuts.delta_blocks


def gates_behind(names: Any, shape: Any) -> list[cuts.Block]:
    """Cut q_proj as if the gates of all heads came behind all heads."""
    d, heads = shape.kv_channels, shape.num_attention_heads

    def moved(block: cuts.Block) -> cuts.Block:
        head, is_gate = divmod(block.first // d, 2)
        return replace(block, first=(is_gate * heads + head) * d)

    return [moved(b) if b.name == names[0] else b for b in query_groups(names, shape)]


def otherwise_joined(names: Any, own: Any, shape: Any) -> list[list[cuts.Block]]:
    """Cut in_proj with parts that alternate by head where they do not, and the other way."""
    return delta_blocks(names, replace(own, joined_by_head=not own.joined_by_head), shape)


BREAKS: dict[str, tuple[Any, str, Any]] = {
    "gates among queries": (cuts, "query_groups", gates_behind),
    "parts by head": (cuts, "delta_blocks", otherwise_joined),
    "the norm around one": (weights, "_AROUND_ONE", ()),
}


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("what", BREAKS)
@over(ONE)
def test_each_part_of_the_weights_shows_in_the_logits(
    layout: Layout, what: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*BREAKS[what])
    directory, expected = reference(case)
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory), hf_models.IDS)[..., : hf_models.VOCAB]
    assert (found - expected).abs().max() > 10 * TOLERANCE


@over(ONE)
def test_the_order_of_gates_among_queries_shows_in_an_adapter(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors, expected = adapted("qwen3_5_text")
    monkeypatch.setattr(fused, "_by_head", lambda q, shape, *, to_hf: q)
    with model_parallel(layout):
        chunks = build(layout, "qwen3_5_text")
        put(chunks, "qwen3_5_text", factors, CONFIG)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    assert (found - expected).abs().max() > 10 * TOLERANCE


ALL = LoRAConfig(rank=8, alpha=16.0, expert_rank=4, delta_gates=True)


@pytest.mark.parametrize("case", BOTH)
@over(Layout(), Layout(tp=2, sp=True))
def test_adapters_of_gates_are_exchanged_where_they_are_asked_for(
    layout: Layout, case: str
) -> None:
    directory, _ = reference(case)
    model = hf_models.hf_model_from(directory)
    factors = hf_models.random_factors(model, RANKS, gates=True)
    gates = [name for name in factors if name.endswith(("in_proj_b", "in_proj_a", "in_proj_ba"))]
    assert gates
    expected = hf_models.logits(hf_models.merged(model, factors))
    shape = model_shape(read_config(directory))
    with model_parallel(layout):
        chunks = build(layout, case, ALL)
        put(chunks, case, factors, ALL)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        gathered = gather_adapters(chunks)
        with pytest.raises(ValueError, match=r"in_proj_b.*--lora-delta-gates"):
            put(chunks, case, factors, CONFIG)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    if torch.distributed.get_rank() == 0:
        exported = to_hf(gathered, ALL, shape)
        assert exported.keys() == factors.keys()
        assert all(exported[name].lora_B.equal(module.lora_B) for name, module in factors.items())


@over(Layout(), Layout(tp=2, sp=True))
def test_the_language_model_of_a_multimodal_directory_is_saved_by_itself(layout: Layout) -> None:
    directory, expected = reference("qwen3_5_moe")
    target = shared_directory()
    with model_parallel(layout):
        save_hf_base(hf.load(layout, directory), target, read_config(directory))
    if torch.distributed.get_rank() == 0:
        saved = hf_models.hf_model_from(target)
        assert type(saved).__name__ == "Qwen3_5MoeForCausalLM"
        torch.testing.assert_close(hf_models.logits(saved), expected, atol=1e-5, rtol=1e-5)
