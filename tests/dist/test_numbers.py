"""A number that is not finite, on one rank of two, is refused on both, by name."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megalora.adapters.adapter import named_adapters
from megalora.adapters.merge import merge
from megalora.builder import apply_lora
from megalora.checkpoint.base import differences, fingerprint
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.checkpoint.read import DESCRIPTION
from megalora.checkpoint.schedule import stored_rates
from megalora.checkpoint.state import refuse_not_finite
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.base_out import hf_config, save_hf_base
from megalora.hf.exchange import export_adapter
from tests.dist.support import hf
from tests.dist.support.cases import KINDS
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import lora_config
from tests.dist.test_hf_base import broken_copy

NUMBERS = pytest.mark.bad_input("a number that is not one")
PP2, TP2, DP2 = Layout(pp=2), Layout(tp=2), Layout(dp=2)
NAN, INF = float("nan"), float("inf")


def build(layout: Layout, kind: str = "dense", **changes: Any) -> list[Any]:
    return build_model(layout, **{**KINDS[kind].model, **changes})


@torch.no_grad()
def spoil(chunks: list[Any], part: str, value: float, *, on: int = 1) -> None:
    """Put a value into the last parameter with this part in its name, on one rank alone."""
    if dist.get_rank() == on:
        params = [p for chunk in chunks for name, p in chunk.named_parameters() if part in name]
        params[-1].view(-1)[-1] = value


def refused(what: Callable[[], object], message: str) -> None:
    """Assert that every rank refuses, with the same message, and none waits for another."""
    with pytest.raises(ValueError, match=message) as error:
        what()
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, str(error.value))
    assert len(set(said)) == 1, said


# === Bases ===


@NUMBERS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("part", "family"),
    [
        ("linear_fc2.weight", "decoder.layers.mlp.linear_fc2.weight"),
        ("layernorm.weight", "decoder.final_layernorm.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)
@over(PP2)
def test_a_base_is_refused(layout: Layout, part: str, family: str, value: float) -> None:
    with model_parallel(layout):
        chunks = build(layout)
        fingerprint(chunks)
        spoil(chunks, part, value)
        refused(lambda: fingerprint(chunks), f"NaN or infinite weights in {re.escape(family)}: ")


def hf_directory(tmp_path: Path, name: str, value: float, row: int) -> Path:
    """Write a Hugging Face model with one value that is not a number; every rank has its own."""
    directory = broken_copy("qwen3", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[name][row, 3] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


NAMES = ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]


@NUMBERS
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", NAMES)
@over(PP2, TP2)
def test_a_hugging_face_base_is_refused_by_tensor_and_file(
    layout: Layout, name: str, value: float, tmp_path: Path
) -> None:
    directory = hf_directory(tmp_path, name, value, -1)
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        message = rf"model\.safetensors: {re.escape(name)} as torch\.float32: download it again"
        refused(lambda: load_hf_base(chunks, directory), message)


@NUMBERS
@over(TP2)
def test_a_base_beyond_its_precision_is_refused(layout: Layout, tmp_path: Path) -> None:
    directory = hf_directory(tmp_path, NAMES[0], 1e5, 0)
    with model_parallel(layout):
        load_hf_base(hf.build(layout, directory), directory)
        chunks = [chunk.half() for chunk in hf.build(layout, directory)]
        refused(lambda: load_hf_base(chunks, directory), "as torch.float16.*need --bf16")


@NUMBERS
@over(TP2)
def test_a_base_that_is_not_finite_is_not_written(layout: Layout, tmp_path: Path) -> None:
    with model_parallel(layout):
        chunks = hf.build(layout, broken_copy("qwen3", tmp_path))
        config = hf_config(chunks[0], model_type="qwen3", vocab_size=66)
        spoil(chunks, "linear_fc2.weight", NAN)
        message = r"in model\.layers\.1\.mlp\.down_proj\.weight as torch\.bfloat16: nothing"
        out = tmp_path / "out"
        refused(lambda: save_hf_base(chunks, out, config, dtype=torch.bfloat16), message)
        assert not out.exists()


GOOD = {"dtypes": ["float32"], "weights": {"a": [4, 1.0, 2.0]}}


STORED: dict[str, Any] = {
    "sum NaN": {"a": [4, NAN, 2.0]},
    "sum infinite": {"a": [4, INF, 2.0]},
    "sum null": {"a": [4, None, 2.0]},
    "sum true": {"a": [4, True, 2.0]},
    "sum a text": {"a": [4, "1", 2.0]},
    "norm NaN": {"a": [4, 1.0, NAN]},
    "norm infinite": {"a": [4, 1.0, INF]},
    "norm negative": {"a": [4, 1.0, -2.0]},
    "norm of 400 digits": {"a": [4, 1.0, 10**400]},
    "count negative": {"a": [-4, 1.0, 2.0]},
    "no family": {},
    "family null": {"a": None},
    "family short": {"a": [4]},
    "family an object": {"a": {}},
    "all null": None,
}


@NUMBERS
@pytest.mark.parametrize("weights", STORED.values(), ids=STORED)
@pytest.mark.world_1
def test_a_stored_fingerprint_that_is_none_accepts_no_base(weights: object) -> None:
    stored = json.loads(json.dumps({**GOOD, "weights": weights}))
    assert differences(GOOD, GOOD) == []
    assert len(differences(stored, GOOD)) == 1
    for other in ({}, [], "", 3, None):
        assert len(differences(other, GOOD)) == 1


SCHEDULE = dict.fromkeys(("max_lr", "min_lr", "start_wd", "end_wd", "num_steps"), 1)


@NUMBERS
@pytest.mark.parametrize("value", [NAN, INF, None, "1", True], ids=str)
@pytest.mark.parametrize("name", SCHEDULE)
@pytest.mark.world_1
def test_a_stored_rate_that_is_no_number_is_not_followed(name: str, value: object) -> None:
    args = argparse.Namespace(use_checkpoint_opt_param_scheduler=True, no_load_optim=False)
    assert stored_rates(args, SCHEDULE) == {"lr": 1, "min_lr": 1}
    with pytest.raises(ValueError, match=f"schedule has {name} .*no finite number"):
        stored_rates(args, {**SCHEDULE, name: value})


# === Adapters ===


def adapted(layout: Layout, **lora: Any) -> list[Any]:
    return apply_lora(build(layout), lora_config("dense", **lora))


@NUMBERS
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@over(DP2, TP2, PP2)
def test_adapters_that_diverged_are_not_saved(layout: Layout, factor: str) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        refuse_not_finite(chunks, "{}".format)
        spoil(chunks, f"linear_fc2_lora.{factor}", NAN)
        name = rf"decoder\.layers\.\d\.mlp\.linear_fc2_lora\.{factor} on rank 1"
        refused(lambda: refuse_not_finite(chunks, "in {}".format), f"^in {name}$")


@NUMBERS
@over(DP2)
def test_a_checkpoint_of_them_is_not_gone_on_from(layout: Layout) -> None:
    with model_parallel(layout):
        (chunk,) = adapted(layout)
        state = {**chunk.state_dict_for_save_checkpoint()}
        state[DESCRIPTION] = json.dumps(chunk.megalora_description)
        chunk.load_state_dict(state)
        spoil([chunk], "linear_fc2_lora.lora_A", INF)
        refused(lambda: chunk.load_state_dict(state), r"linear_fc2_lora\.lora_A on rank 1: give")


@NUMBERS
@pytest.mark.parametrize(("value", "dtype"), [(NAN, torch.float32), (1e5, torch.float16)])
@over(PP2)
def test_adapters_are_loaded_whole_or_not(layout: Layout, value: float, dtype: torch.dtype) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        told = [gather_adapters(chunks)]
        dist.broadcast_object_list(told, src=0)
        # A tensor of the last stage alone.
        name = "output_layer_lora.lora_A"
        told[0][name][0, 0] = value
        for _, adapter in named_adapters(chunks):
            adapter.to(dtype)
        before = [p.clone() for chunk in chunks for p in chunk.parameters()]
        refused(lambda: load_adapters(chunks, told[0]), rf"{name} as {dtype}: it diverged")
        after = [p for chunk in chunks for p in chunk.parameters()]
        assert all(map(torch.equal, before, after))


@NUMBERS
@over(TP2)
def test_adapters_that_diverged_are_not_exported(layout: Layout, tmp_path: Path) -> None:
    with model_parallel(layout):
        chunks = adapted(layout)
        spoil(chunks, "linear_fc2_lora.lora_B", NAN)
        config = lora_config("dense")
        message = r"NaN or infinite values in model\.layers\.\d\.mlp\.down_proj: use a checkpoint"
        refused(lambda: export_adapter(chunks, tmp_path / "out", config=config), message)
        assert not (tmp_path / "out").exists()


@torch.no_grad()
def fill(chunks: list[Any], value: float) -> None:
    for _, adapter in named_adapters(chunks):
        for param, _ in adapter.factors():
            param.fill_(value)


@NUMBERS
@pytest.mark.parametrize(
    ("factors", "part", "value", "dtype"),
    [
        (1e30, "", 0.0, torch.float32),
        (1000.0, "", 0.0, torch.float16),
        (0.0, "linear_fc2_lora.lora_A", NAN, torch.float32),
        (0.0, "linear_fc2.weight", INF, torch.float32),
    ],
    ids=["beyond fp32", "beyond fp16", "a NaN adapter", "an infinite base"],
)
@over(TP2)
def test_a_merge_that_is_not_finite_changes_nothing(
    layout: Layout, factors: float, part: str, value: float, dtype: torch.dtype
) -> None:
    with model_parallel(layout):
        chunks = [chunk.to(dtype) for chunk in adapted(layout)]
        merge(chunks)
        chunks = [chunk.to(dtype) for chunk in adapted(layout)]
        fill(chunks, factors)
        if part:
            spoil(chunks, part, value)
        before = [p.clone() for chunk in chunks for p in chunk.parameters()]
        refused(lambda: merge(chunks), r"cannot be merged: .*, of decoder\.layers\.\d")
        after = [p for chunk in chunks for p in chunk.parameters()]
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after, strict=True))


@over(TP2)
def test_a_merge_above_the_bound_is_made_where_its_sum_is_finite(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = [chunk.half() for chunk in adapted(layout, shared_a=True)]
        fill(chunks, 0.0)
        for _, adapter in named_adapters(chunks):
            # Rows and columns that do not meet: B A is zero, the bound of it 2e5 and more.
            adapter.lora_A.data[0] = 500.0
            adapter.lora_B.data[:, 1] = 500.0
        merge(chunks)
        assert all(p.isfinite().all() for chunk in chunks for p in chunk.parameters())


PISSA = LoRAConfig(rank=4, alpha=6.0, init="pissa")


@NUMBERS
@over(PP2)
def test_pissa_starts_from_finite_weights_alone(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build(layout)
        spoil(chunks, "linear_fc2.weight", NAN)
        refused(lambda: apply_lora(chunks, PISSA), r"pissa needs finite.*linear_fc2$")


@NUMBERS
@over(PP2)
def test_pissa_starts_within_the_precision(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build(layout, params_dtype=torch.float16)
        config = LoRAConfig(rank=4, alpha=1e-20, init="pissa")
        refused(lambda: apply_lora(chunks, config), "pissa starts beyond the adapters' precision")


@NUMBERS
@pytest.mark.parametrize(("rank", "warned"), [(32, False), (4096, True)])
@pytest.mark.world_1
def test_a_rank_above_its_base_is_warned_of(
    rank: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with model_parallel(Layout()):
        adapted(Layout(), rank=rank)
    said = f"rank {rank} of decoder.layers.0.self_attention.linear_proj_lora is above "
    assert (said in capsys.readouterr().out) == warned
