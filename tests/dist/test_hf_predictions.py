"""A layer that predicts one token more: left out, or loaded where a model was built with it."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from megalora.builder import apply_lora
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.base_out import hf_config, save_hf_base
from megalora.hf.exchange import check_export
from megalora.model.config_json import read_config
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.test_hf_adapters import shared_directory
from tests.dist.test_hf_base import TOLERANCE
from tests.support import hf_models
from tests.support.hf_predictions import FILE, LAYER, add_prediction, predicted, predicting

FAMILIES = ("deepseek_v3", "glm4_moe")
ONE, TWO = Layout(), Layout(tp=2, sp=True)


@functools.cache
def reference(family: str) -> tuple[Path, torch.nn.Module, MtpModel]:
    """Write a tiny model's directory with the layer behind it; return it with both."""
    model, layer = predicting(family)
    directory = shared_directory()
    model.save_pretrained(directory)
    if dist.get_rank() == 0:
        add_prediction(directory, model, layer)
    dist.barrier()
    return directory, model, layer


def hidden(layout: Layout, chunks: list[Any]) -> list[torch.Tensor]:
    """Return what the layer makes of each token, [b, s, h], where this rank has the layer."""
    found: list[torch.Tensor] = []
    for chunk in chunks:
        if hasattr(chunk, "mtp"):
            keep = lambda _module, _inputs, output: found.append(output[0])  # noqa: E731
            chunk.mtp.layers[0].register_forward_hook(keep)
    hf.logits(chunks, hf_models.IDS)
    if layout.sp:
        parts = [[torch.empty_like(one) for _ in range(layout.tp)] for one in found]
        for part, one in zip(parts, found, strict=True):
            dist.all_gather(part, one.contiguous())
        found = [torch.cat(part) for part in parts]
    return [one.transpose(0, 1) for one in found]


@pytest.mark.parametrize("family", FAMILIES)
@over(ONE, TWO, Layout(pp=2), Layout(dp=2, ep=2))
def test_the_layer_predicts_what_that_of_transformers_does(layout: Layout, family: str) -> None:
    directory, model, layer = reference(family)
    expected = predicted(model, layer)
    with model_parallel(layout):
        found = hidden(layout, hf.load(layout, directory, mtp_num_layers=1))
    for one in found:
        torch.testing.assert_close(one[:, :-1], expected, atol=TOLERANCE, rtol=TOLERANCE)
    ranks = torch.tensor(int(bool(found)))
    dist.all_reduce(ranks)
    assert ranks == layout.world_size // layout.pp


@pytest.mark.parametrize("family", FAMILIES)
@over(ONE, TWO)
def test_the_layer_is_left_out_where_nobody_asks_for_it(layout: Layout, family: str) -> None:
    directory, model, _ = reference(family)
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    expected = hf_models.logits(model)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@over(ONE)
def test_more_layers_than_the_files_have_are_refused(layout: Layout) -> None:
    directory, _, _ = reference("glm4_moe")
    with model_parallel(layout):
        chunks = hf.build(layout, directory, mtp_num_layers=2)
        with pytest.raises(ValueError, match="mtp_num_layers is 2, must be 1"):
            load_hf_base(chunks, directory)


def changed(directory: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """Copy a directory with another tensor, or without it."""
    copy = shared_directory()
    if dist.get_rank() == 0:
        tensors = load_file(directory / FILE)
        tensors.pop(name)
        tensors |= {} if tensor is None else {name: tensor}
        save_file(tensors, copy / FILE, {"format": "pt"})
        (copy / "config.json").write_text((directory / "config.json").read_text())
    dist.barrier()
    return copy


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
@over(TWO, Layout(pp=2))
def test_tables_of_its_own_are_refused_on_all_ranks(layout: Layout, copy: str) -> None:
    directory, _, _ = reference("deepseek_v3")
    name = f"{LAYER}{copy}.weight"
    other = load_file(directory / FILE)[name]
    # Of the last rank's rows alone.
    other[-1, -1] += 1
    directory = changed(directory, name, other)
    with model_parallel(layout):
        chunks = hf.build(layout, directory, mtp_num_layers=1)
        with pytest.raises(ValueError, match=f"{name} differs from .*leave --mtp-num-layers out"):
            load_hf_base(chunks, directory)


@over(ONE)
def test_a_layer_that_is_not_whole_is_refused(layout: Layout) -> None:
    directory, _, _ = reference("deepseek_v3")
    directory = changed(directory, f"{LAYER}enorm.weight", None)
    with model_parallel(layout):
        chunks = hf.build(layout, directory, mtp_num_layers=1)
        with pytest.raises(ValueError, match=rf"is missing {LAYER}enorm\.weight"):
            load_hf_base(chunks, directory)


@pytest.mark.parametrize("family", FAMILIES)
@over(ONE, Layout(tp=2, sp=True, ep=2), Layout(pp=2))
def test_a_saved_base_has_the_layer_where_its_model_has_it(layout: Layout, family: str) -> None:
    directory, _, _ = reference(family)
    with_it, without = shared_directory(), shared_directory()
    with model_parallel(layout):
        chunks = hf.load(layout, directory, mtp_num_layers=1)
        config = hf_config(chunks[0], model_type=family, vocab_size=hf_models.VOCAB)
        save_hf_base(chunks, with_it, config)
        save_hf_base(hf.load(layout, directory), without, read_config(directory))
    if dist.get_rank() == 0:
        saved, left = load_file(with_it / FILE), load_file(without / FILE)
        assert {name for name in saved if name.startswith(LAYER)} == saved.keys() - left.keys()
        for name in (f"{LAYER}eh_proj.weight", f"{LAYER}embed_tokens.weight"):
            assert torch.equal(saved[name], load_file(directory / FILE)[name])
        counts = [
            json.loads((place / "config.json").read_text())["num_nextn_predict_layers"]
            for place in (with_it, without)
        ]
        assert counts == [1, 0]


@over(ONE)
def test_its_adapters_are_no_hugging_face_adapters(layout: Layout) -> None:
    directory, _, _ = reference("deepseek_v3")
    options = {"vocab_size": hf_models.VOCAB, "hf_model": str(directory)}
    with model_parallel(layout):
        for targets in (("all",), ("decoder.*linear_*", "output_layer")):
            config = LoRAConfig(rank=8, expert_rank=2, targets=targets)
            chunks = apply_lora(hf.load(layout, directory, mtp_num_layers=1), config)
            if targets == ("all",):
                with pytest.raises(ValueError, match=r"mtp\.layers\.0\..*'decoder"):
                    check_export(chunks, config=config, **options)
            else:
                check_export(chunks, config=config, **options)
