"""Nemotron-H: each part of its layers shows in the logits, and other builds are refused."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megalora.checkpoint.gather import gather_adapters
from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.base import load_hf_base
from megalora.hf.exchange import check_export, export_adapter, load_adapter
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.test_hf_adapters import CONFIG, adapted, build, put, shared_directory
from tests.dist.test_hf_base import (
    ONE,
    TOLERANCE,
    assert_same_logits,
    assert_shows,
    broken_copy,
    reference,
)
from tests.support import hf_models

CASE = "nemotron_h"
PARTS = {"z": 60, "x": 60, "B": 24, "C": 24, "dt": 6}


def mixer(chunk: Any) -> Any:
    return chunk.decoder.layers[0].mixer


def rows(chunk: Any, order: str) -> None:
    """Give in_proj's rows, of which z and x, and B and C, are of one size, another order."""
    parts = dict(zip(PARTS, mixer(chunk).in_proj.weight.split(list(PARTS.values())), strict=True))
    mixer(chunk).in_proj.weight.copy_(torch.cat([parts[name] for name in order.split()]))


def channels(chunk: Any) -> None:
    x, b, c = mixer(chunk).conv1d_weight.split([60, 24, 24])
    mixer(chunk).conv1d_weight.copy_(torch.cat([x, c, b]))


def group_size(chunk: Any) -> None:
    mixer(chunk).norm.group_size = 60


def zeroed(name: str) -> Callable[[Any], None]:
    return lambda chunk: mixer(chunk).get_parameter(name).zero_()


def scaling(chunk: Any) -> None:
    chunk.config.moe_router_topk_scaling_factor = 1.0


def choice(chunk: Any) -> None:
    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.expert_bias.zero_()


def norms(chunk: Any) -> None:
    """Swap the norms of two layers, each of which has one."""
    one, other = chunk.decoder.layers[0].norm.weight, chunk.decoder.layers[2].input_layernorm.weight
    held = one.clone()
    one.copy_(other)
    other.copy_(held)


SHOWN = {
    "z and x": lambda chunk: rows(chunk, "x z B C dt"),
    "B and C": lambda chunk: rows(chunk, "z x C B dt"),
    "channels": channels,
    "the groups of the norm": group_size,
    "the convolution's bias": zeroed("conv1d_bias"),
    "A": zeroed("A_log"),
    "D": zeroed("D"),
    "dt's bias": zeroed("dt_bias"),
    "the router's scaling": scaling,
    "the bias of the choice": choice,
    "which norm is whose": norms,
}


@pytest.mark.parametrize("part", SHOWN)
@over(ONE)
def test_each_part_shows_in_the_logits(layout: Layout, part: str) -> None:
    assert_shows(layout, CASE, SHOWN[part])


@over(Layout(pp=2, vpp=2))
def test_a_users_own_stages_keep_the_logits(layout: Layout) -> None:
    assert_same_logits(layout, CASE, pattern="M|E*|-E|M")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "ME*-ME"}, "hybrid_layer_pattern is 'ME\\*-ME', must be 'ME\\*-EM'"),
        ({"pattern": "*-*E"}, "hybrid_layer_pattern is None, must be 'ME\\*-EM'"),
        ({"pattern": "ME*-EG"}, r"'ME\*-EG', which has a gated delta net \(G\)"),
        ({"mamba_state_dim": 10}, "mamba_state_dim is 10, must be 12"),
        ({"mamba_head_dim": 20}, "mamba_head_dim is 20, must be 10"),
        ({"mamba_num_groups": 3}, "mamba_num_groups is 3, must be 2"),
        ({"mamba_num_heads": 12}, "mamba_num_heads is 12, must be 6"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope', must be 'none'"),
        (
            {"activation_func": torch.nn.functional.silu},
            "activation_func is 'silu', must be 'squared_relu'",
        ),
        ({"gated_linear_unit": True}, "gated_linear_unit is True, must be False"),
        ({"moe_router_topk_scaling_factor": 1.0}, "topk_scaling_factor is 1.0, must be 2.5"),
    ],
    ids=str,
)
@over(ONE)
def test_a_model_built_otherwise_is_refused(
    layout: Layout, changes: dict[str, Any], message: str
) -> None:
    directory, _ = reference(CASE)
    with model_parallel(layout):
        if "G" in changes.get("pattern", ""):
            chunks = hf.build(layout, directory)
            chunks[0].hybrid_layer_pattern = changes["pattern"]
        else:
            chunks = hf.build(layout, directory, **changes)
        with pytest.raises(ValueError, match=message):
            load_hf_base(chunks, directory)


@over(ONE)
def test_another_family_is_not_built_of_layers_of_mamba(layout: Layout) -> None:
    directory, _ = reference("llama")
    with model_parallel(layout):
        chunks = hf.build(layout, reference(CASE)[0])
        with pytest.raises(ValueError, match=r"layer 0 is Mamba \(M\), which Nemotron-H alone has"):
            load_hf_base(chunks, directory)


@over(ONE)
def test_layers_that_predict_one_token_more_are_left_where_they_are(
    layout: Layout, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory = broken_copy(CASE, tmp_path, num_nextn_predict_layers=1)
    tensors = load_file(directory / "model.safetensors")
    tensors["mtp.layers.0.norm.weight"] = torch.ones(hf_models.HIDDEN)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with model_parallel(layout):
        found = hf.logits(hf.load(layout, directory), hf_models.IDS)[..., : hf_models.VOCAB]
    torch.testing.assert_close(found, reference(CASE)[1], atol=TOLERANCE, rtol=TOLERANCE)


@over(ONE, Layout(tp=2, sp=True, ep=2), Layout(pp=2))
def test_an_export_is_loaded_again_and_has_the_names_of_transformers(layout: Layout) -> None:
    factors, expected = adapted(CASE)
    directory, target = str(reference(CASE)[0]), shared_directory() / "a"
    options = {"config": CONFIG, "vocab_size": hf_models.VOCAB, "hf_model": directory}
    with model_parallel(layout):
        chunks = build(layout, CASE)
        put(chunks, CASE, factors, CONFIG)
        export_adapter(chunks, target, **options)
        again = build(layout, CASE)
        load_adapter(again, target, CONFIG, hf_model=directory)
        found = hf.logits(again, hf_models.IDS)[..., : hf_models.VOCAB]
        format, said = check_export(chunks, server="vllm", **options)
        with pytest.raises(
            ValueError, match=r"refuses adapters of NemotronHForCausalLM's out_proj"
        ):
            check_export(chunks, server="peft", **options)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (format, said[0][:18]) == ("peft", "vLLM 0.33.0 takes ")
    assert read_adapter(target, names=names_of(CASE)).keys() == factors.keys()
    config = json.loads((target / "adapter_config.json").read_text())
    assert "model.layers.0.mixer.in_proj" in config["target_modules"]


@over(ONE)
def test_what_peft_takes_is_exported_for_it(layout: Layout) -> None:
    config = LoRAConfig(rank=4, targets=("attn", "mlp", "in_proj", "unembed"))
    directory = str(reference(CASE)[0])
    with model_parallel(layout):
        chunks = build(layout, CASE, config)
        options = {"config": config, "vocab_size": hf_models.VOCAB, "hf_model": directory}
        assert check_export(chunks, server="peft", **options)[0] == "peft-3d"


TINKER = LoRAConfig(rank=8, alpha=16.0, expert_rank=4, targets=("tinker",))


@functools.cache
def of_z_and_x() -> tuple[dict[str, LoRAFactors], torch.Tensor]:
    """Return factors of which in_proj's are a block for z and one for x, and the logits of both."""
    factors, _ = adapted(CASE)
    factors, (z, x) = dict(factors), (slice(0, 60), slice(60, 120))
    for name, module in factors.items():
        if name.endswith("in_proj"):
            b = torch.zeros(sum(PARTS.values()), 16)
            b[z, :8], b[x, 8:] = module.lora_B[z], module.lora_B[x]
            a = torch.cat([module.lora_A, module.lora_A.flip(1)])
            factors[name] = LoRAFactors(a, b, module.scale)
    model = hf_models.hf_model_from(reference(CASE)[0])
    return factors, hf_models.logits(hf_models.merged(model, factors))


@over(ONE, Layout(tp=2, sp=True), Layout(pp=2))
def test_z_and_x_of_in_proj_have_an_a_each_by_the_preset_tinker(layout: Layout) -> None:
    factors, expected = of_z_and_x()
    with model_parallel(layout):
        chunks = build(layout, CASE, TINKER)
        put(chunks, CASE, factors, TINKER)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        gathered = gather_adapters(chunks)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    if dist.get_rank() == 0:
        name = "decoder.layers.0.mixer.in_proj_lora.lora_"
        assert (gathered[name + "A"].shape, gathered[name + "B"].shape) == ((16, 32), (120, 8))
        exported = to_hf(gathered, TINKER, model_shape(read_config(reference(CASE)[0])))
        assert exported.keys() == factors.keys()
        for name, module in factors.items():
            assert torch.equal(exported[name].lora_A, module.lora_A), name
            assert torch.equal(exported[name].lora_B, module.lora_B), name


@pytest.mark.bad_input("a malformed file")
@over(ONE)
def test_an_update_of_what_the_preset_leaves_out_is_refused(layout: Layout) -> None:
    factors, _ = adapted(CASE)
    shape = model_shape(read_config(reference(CASE)[0]))
    with pytest.raises(ValueError, match=r"in_proj: lora_B has an update of B, C or dt"):
        from_hf(factors, TINKER, shape)
    both = replace(TINKER, targets=("in_proj", "tinker"))
    assert from_hf(factors, both, shape, padded_vocab_size=hf.PADDED_VOCAB)
