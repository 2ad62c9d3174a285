"""Families built as the HybridModel that equals them: logits, adapters, exports, start values."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.checkpoint.base import fingerprint
from megalora.checkpoint.gather import gather_adapters
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.base_out import hf_config, save_hf_base
from megalora.hf.exchange import export_adapter, load_adapter
from megalora.model.config_json import read_config
from tests.dist import test_hf_predictions
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import MAMBA
from tests.dist.test_hf_adapters import (
    CONFIG,
    TOLERANCE,
    adapted,
    assert_exchanges,
    assert_saves_base,
    build,
    put,
)
from tests.dist.test_hf_base import CASES, ONE, assert_same_logits, reference
from tests.support import hf_models
from tests.support.hf_predictions import predicted


@pytest.mark.parametrize("case", CASES)
@over(ONE)
def test_every_family_has_these_logits_as_a_hybrid(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case, hybrid=True)


@pytest.mark.parametrize(
    "case",
    ["llama", "qwen3_moe-mixed", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next-mixed"],
)
@over(Layout(tp=2, sp=True), Layout(pp=2))
def test_sharding_keeps_the_logits_of_a_hybrid(layout: Layout, case: str) -> None:
    assert_same_logits(layout, case, hybrid=True)


@pytest.mark.parametrize("family", test_hf_predictions.FAMILIES)
@over(ONE, Layout(tp=2, sp=True))
def test_the_layer_that_predicts_one_token_more_is_that_of_a_hybrid(
    layout: Layout, family: str
) -> None:
    directory, model, layer = test_hf_predictions.reference(family)
    with model_parallel(layout):
        chunks = hf.load(layout, directory, hybrid=True, mtp_num_layers=1)
        (found,) = test_hf_predictions.hidden(layout, chunks)
    expected = predicted(model, layer)
    torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=TOLERANCE)


@over(Layout(dp=2, ep=2), Layout(tp=2, sp=True, pp=2, ep=2))
def test_expert_sharding_keeps_the_logits_of_a_hybrid(layout: Layout) -> None:
    assert_same_logits(layout, "qwen3_moe", hybrid=True)


@over(Layout(pp=2, vpp=2))
def test_virtual_stages_keep_the_logits_of_a_hybrid(layout: Layout) -> None:
    assert_same_logits(layout, "qwen3", num_layers=4, hybrid=True)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("-*E*", r"'-\*E\*', whose layer 0 is an MLP \(-\), where a family has attention \(\*\)"),
        ("*-**E", r"whose layer 3 is attention \(\*\), where a family has an MLP \(-\) or exper"),
        ("*-*", r"whose last layer is attention \(\*\), behind which a family has an MLP"),
        ("*-*E-", r"whose layer 4 is an MLP \(-\), where a family has attention"),
        ("*-*EM", r"whose layer 4 is Mamba \(M\), which Nemotron-H alone has"),
        ("*-*E/*-", r"part '\*-' behind / predicts one token more, where a family has '\*E'"),
        ("*E*-", r"moe_layers is \[1, 0\], must be \[0, 1\]"),
        ("*-*-", "num_moe_experts is 0, must be 16"),
        ("*-*E*E", "num_layers is 3, must be 2"),
    ],
)
@over(ONE)
def test_a_hybrid_of_other_layers_is_refused(layout: Layout, pattern: str, message: str) -> None:
    directory, _ = reference("qwen3_moe-mixed")
    with model_parallel(layout):
        chunks = hf.build(layout, directory, hybrid=True, pattern=pattern, **MAMBA)
        with pytest.raises(ValueError, match=message):
            load_hf_base(chunks, directory)


@over(ONE)
def test_a_hybrid_that_attends_where_a_family_has_delta_nets_is_refused(layout: Layout) -> None:
    directory, _ = reference("qwen3_next")
    with model_parallel(layout):
        chunks = hf.build(layout, directory, hybrid=True, pattern="*E*E")
        with pytest.raises(ValueError, match="variant is None, must be 'gated_delta_net'"):
            load_hf_base(chunks, directory)


@pytest.mark.parametrize("case", ["llama", "qwen3_moe-mixed", "deepseek_v3", "qwen3_5_text"])
@over(Layout(), Layout(tp=2, sp=True), Layout(pp=2))
def test_a_hybrid_exchanges_the_same_adapters(layout: Layout, case: str) -> None:
    assert_exchanges(layout, case, hybrid=True)


@pytest.mark.parametrize(
    ("case", "mode"),
    [("qwen3_moe-mixed", "per_expert"), ("llama", "per_expert"), ("deepseek_v3", "shared_outer")],
)
@over(Layout(), Layout(tp=2, sp=True))
def test_a_hybrid_is_described_and_starts_as_the_gpt_model_that_it_equals(
    layout: Layout, case: str, mode: Any
) -> None:
    config, found = LoRAConfig(rank=6, expert_mode=mode), []
    with model_parallel(layout):
        for hybrid in (False, True):
            chunks = build(layout, case, config, hybrid=hybrid)
            found.append((chunks[0].megalora_description, fingerprint(chunks), tensors_of(chunks)))
    (*gpt, start), (*own, hybrid_start) = found
    assert own == gpt
    assert hybrid_start.keys() == start.keys()
    assert all(hybrid_start[name].equal(start[name]) for name in start)


def tensors_of(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gather_adapters(chunks).items()}


@over(Layout())
def test_a_hybrid_exports_the_bytes_of_the_gpt_model_that_it_equals(
    layout: Layout, tmp_path: Path
) -> None:
    directory, _ = reference("qwen3_moe-mixed")
    factors, _ = adapted("qwen3_moe-mixed")
    for way in ("gpt", "hybrid"):
        with model_parallel(layout):
            chunks = build(layout, "qwen3_moe-mixed", hybrid=way == "hybrid")
            put(chunks, "qwen3_moe-mixed", factors, CONFIG)
            options = {"vocab_size": hf_models.VOCAB, "hf_model": str(directory)}
            export_adapter(chunks, tmp_path / way, config=CONFIG, **options)
            again = build(layout, "qwen3_moe-mixed", hybrid=way == "gpt")
            load_adapter(again, tmp_path / way, CONFIG, hf_model=str(directory))
            found = hf.logits(again, hf_models.IDS)[..., : hf_models.VOCAB]
        expected = adapted("qwen3_moe-mixed")[1]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    written = [sorted(path.iterdir()) for path in (tmp_path / "gpt", tmp_path / "hybrid")]
    for one, other in zip(*written, strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


@pytest.mark.parametrize("case", ["mistral", "qwen2", "glm4_moe", "deepseek_v3", "qwen3_next"])
@over(Layout())
def test_a_saved_base_of_a_hybrid_is_the_model_that_was_loaded(layout: Layout, case: str) -> None:
    assert_saves_base(layout, case, hybrid=True)


@over(Layout())
def test_scaled_frequencies_of_a_hybrid_are_noticed_and_its_own_config_is_taken(
    layout: Layout, tmp_path: Path
) -> None:
    directory, expected = reference("llama")
    with model_parallel(layout):
        chunks = hf.load(layout, directory, hybrid=True)
        with pytest.raises(ValueError, match="the model has rope scaling"):
            hf_config(chunks[0], model_type="llama", vocab_size=hf_models.VOCAB)
        save_hf_base(chunks, tmp_path / "saved", read_config(directory))
    saved = hf_models.logits(hf_models.hf_model_from(tmp_path / "saved"))
    torch.testing.assert_close(saved, expected, atol=1e-5, rtol=1e-5)


@over(Layout(tp=2, sp=True, ep=2), Layout(pp=2))
def test_a_sharded_hybrid_is_saved_whole(layout: Layout) -> None:
    assert_saves_base(layout, "qwen3_moe-mixed", hybrid=True)
