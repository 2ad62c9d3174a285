"""Megatron's logits of a base in an odd form are those of what transformers loads of it."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.builder import apply_lora
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.base_out import save_hf_base
from megalora.hf.exchange import load_adapter
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import write_adapter
from megalora.hf.safetensors_files import HFWeights
from megalora.model.config_json import read_config
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.support import fp8, hf_bases, hf_models, mxfp4
from tests.support.hf_bases import LLAMA3

TOLERANCE = 1e-4
ONE, TP = Layout(), Layout(tp=2)
# Blocks that end within the heads, the experts and a rank's rows and columns.
BLOCK = (16, 24)


def with_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = ("model.", "model.layers.1.self_attn.")
    buffers = {f"{prefix}rotary_emb.inv_freq": torch.ones(8) for prefix in prefixes}
    others = ("self_attn.masked_bias", "self_attn.bias", "attention.bias", "mlp._extra_state")
    buffers |= {f"model.layers.0.{name}": torch.zeros(1, 1) for name in others}
    return {**tensors, **buffers, "model.embeddings.position_ids": torch.arange(4)}


def with_equal_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_head_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table = "model.embed_tokens.weight"
    return {"lm_head.weight" if name == table else name: t for name, t in tensors.items()}


def as_loaded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Mixtral's tensors as transformers 5 has them in memory, and may save them."""
    one = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    found = {name: tensor for name, tensor in one.items() if ".experts." not in name}
    for layer in range(hf_models.LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = (
            torch.stack([one[f"{prefix}.{e}.{w}.weight"] for e in range(hf_models.NUM_EXPERTS)])
            for w in ("w1", "w2", "w3")
        )
        found |= {f"{prefix}.gate_up_proj": torch.cat([w1, w3], 1), f"{prefix}.down_proj": w2}
    return found


FP8: dict[str, Any] = {
    "tensors": fp8.in_fp8(BLOCK),
    "quantization_config": fp8.fp8_config(BLOCK, modules_to_not_convert=["lm_head"]),
}
MXFP4: dict[str, Any] = {
    "tensors": mxfp4.in_mxfp4,
    "quantization_config": mxfp4.CONFIG,
}
FORMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "own head": ("llama", True, {"tensors": hf_bases.own_head}),
    "equal head": ("llama", True, {"tensors": with_equal_head}),
    "head alone": ("llama", True, {"tensors": with_head_alone}),
    "llama3 in rope_scaling": ("qwen3", False, {"rope_scaling": LLAMA3}),
    "buffers": ("llama", False, {"tensors": with_buffers}),
    "mixtral as in memory": ("mixtral", False, {"tensors": as_loaded}),
    "fp8": ("qwen3", False, FP8),
    "fp8 experts": ("qwen3_moe", False, FP8),
    "fp8 latents": ("deepseek_v3", False, FP8),
    "mxfp4": ("gpt_oss", False, MXFP4),
}


@functools.cache
def reference(form: str) -> tuple[Path, Tensor]:
    """Write a base of a form; return it with the logits of what transformers loads of it."""
    family, tied, changes = FORMS[form]
    path: list[Any] = [tempfile.mkdtemp(prefix="megalora-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path, src=0)
    directory = Path(path[0]) / "base"
    config = hf_models.hf_config(family, tied=tied)
    if form == "mxfp4":
        # One block of each expert's columns, of which two ranks have a half each.
        config.intermediate_size = 32
    hf_models.hf_model_of(config).save_pretrained(directory)
    plain = directory.with_name("plain")
    if dist.get_rank() == 0:
        fp8.change(directory, **changes)
        shutil.copytree(directory, plain)
        if form.startswith("fp8"):
            # transformers has no blocks that end within a weight.
            fp8.change(plain, fp8.out_of_fp8(BLOCK), quantization_config=None)
    dist.barrier()
    return directory, hf_bases.loaded_logits(plain)


@pytest.mark.parametrize("form", FORMS)
@over(ONE)
def test_a_form_has_the_logits_of_transformers(layout: Layout, form: str) -> None:
    assert_same_logits(layout, form)


@pytest.mark.parametrize("form", ["own head", "fp8", "fp8 latents"])
@over(TP, Layout(pp=2))
def test_a_form_keeps_its_logits_when_it_is_split(layout: Layout, form: str) -> None:
    assert_same_logits(layout, form)


@pytest.mark.parametrize("form", ["fp8 experts", "mxfp4"])
@over(Layout(dp=2, ep=2), Layout(tp=2, sp=True, etp=2))
def test_quantised_experts_keep_their_logits_when_they_are_split(layout: Layout, form: str) -> None:
    assert_same_logits(layout, form)


def assert_same_logits(layout: Layout, form: str) -> None:
    directory, expected = reference(form)
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory), hf_models.IDS)
    found = found[..., : hf_models.VOCAB]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@over(TP)
def test_a_rank_reads_its_slice_of_fp8_weights_alone(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = reference("fp8")
    read: dict[str, int] = {}
    whole = HFWeights.read

    def counted(self: HFWeights, name: str, *where: Any) -> Tensor:
        part = whole(self, name, *where)
        read[name] = read.get(name, 0) + part.numel()
        return part

    monkeypatch.setattr(HFWeights, "read", counted)
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        load_hf_base(chunks, directory)
    shapes = HFWeights(directory).shapes
    split = [name for name in read if name.endswith("_proj.weight")]
    assert len(split) == 14
    assert all(2 * read[name] == shapes[name][0] * shapes[name][1] for name in split)


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
@over(ONE)
def test_a_quantised_base_is_written_as_plain_numbers(
    layout: Layout, form: str, tmp_path: Path
) -> None:
    directory, expected = reference(form)
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        save_hf_base(chunks, tmp_path / "out", read_config(directory))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["torch_dtype"], "dtype" in config) == ("float32", False)
    found = hf_bases.loaded_logits(tmp_path / "out")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.bad_input("a number that is not one")
@over(ONE)
def test_an_adapter_of_another_vocabulary_is_not_started_from(
    layout: Layout, tmp_path: Path
) -> None:
    directory, _ = reference("buffers")
    config = LoRAConfig(rank=2, targets=("unembed",))
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        apply_lora(chunks, config)
        # The base has 66 rows, the model 72. Of a checkpoint is known what its tokenizer has.
        known: list[tuple[int, dict[str, Any], bool]] = [
            *((rows, {"hf_model": str(directory)}, rows == 66) for rows in (60, 66, 70, 72, 80)),
            *((rows, {"vocab_size": 66}, 66 <= rows <= 72) for rows in (60, 66, 70, 72, 80)),
        ]
        for number, (rows, base, is_right) in enumerate(known):
            head = LoRAFactors(
                torch.ones(2, hf_models.HIDDEN), torch.ones(rows, 2), config.scale(2)
            )
            write_adapter(adapter := tmp_path / str(number), {"lm_head": head}, base_model_name="")
            if is_right:
                load_adapter(chunks, adapter, config, **base)
                continue
            with pytest.raises(ValueError, match=rf"{rows} rows of lm_head, its base's vocabulary"):
                load_adapter(chunks, adapter, config, **base)
