"""What gpt-oss has beside other families: each part shows, and is refused where built otherwise."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from megalora.builder import apply_lora
from megalora.config import LoRAConfig
from megalora.hf.base import load_hf_base
from megalora.hf.rotary import set_rotary
from megalora.model.megatron import megatron_args
from megalora.model.rope import yarn_options
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import YARN
from tests.dist.test_hf_base import ONE, TOLERANCE, assert_shows, broken_copy, reference
from tests.support import hf_models

CASE = "gpt_oss"
Change = Callable[[Any], None]


def attentions(chunk: Any) -> Iterator[Any]:
    return (layer.self_attention for layer in chunk.decoder.layers)


def experts(chunk: Any) -> Iterator[Any]:
    for layer in chunk.decoder.layers:
        yield from layer.mlp.experts.local_experts


def no_offsets(chunk: Any) -> None:
    for attention in attentions(chunk):
        attention.core_attention.softmax_offset.fill_(-1e4)


def window(chunk: Any, sizes: tuple[tuple[int, int] | None, ...]) -> None:
    for attention, size in zip(attentions(chunk), sizes, strict=True):
        attention.core_attention.window = size
        attention.core_attention.is_cut = size is not None


def yarn(chunk: Any, **changes: float) -> None:
    for name, value in changes.items():
        assert hasattr(chunk.rotary_pos_emb, name)
        setattr(chunk.rotary_pos_emb, name, value)
    type(chunk.rotary_pos_emb).forward.cache_clear()


def no_scaling(chunk: Any) -> None:
    yarn(chunk, inv_freq_inter=chunk.rotary_pos_emb.inv_freq_extra)


def size_of_cosines(chunk: Any) -> None:
    for attention in attentions(chunk):
        assert attention._yarn_concentration_factor > 1.1
        attention._yarn_concentration_factor = 1.0


def no_bias(chunk: Any, module: str) -> None:
    found = [p for name, p in chunk.named_parameters() if name.endswith(f"{module}.bias")]
    assert found
    for bias in found:
        bias.zero_()


def activation(chunk: Any, field: str, value: Any) -> None:
    configs = {id(expert.config): expert.config for expert in experts(chunk)}
    for config in configs.values():
        assert getattr(config, field) != value
        setattr(config, field, value)


def side_by_side(chunk: Any) -> None:
    """Take gate and up from rows that lie one after the other in the file."""
    for expert in experts(chunk):
        weight = expert.linear_fc1.weight
        weight.copy_(weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).clone())


PARTS: dict[str, Change] = {
    "softmax offsets": no_offsets,
    "the window": functools.partial(window, sizes=(None, None)),
    "which layers have it": functools.partial(window, sizes=(None, (2, 0))),
    "the scaling": no_scaling,
    "where it begins": functools.partial(yarn, beta_fast=0.2),
    "where it ends": functools.partial(yarn, beta_slow=0.01),
    "whole features": functools.partial(yarn, correction_range_round_to_int=True),
    "the size of cosines": size_of_cosines,
    **{
        f"the bias of {module}": functools.partial(no_bias, module=module)
        for module in ("linear_qkv", "linear_proj", "router", "linear_fc1", "linear_fc2")
    },
    "the clamp": functools.partial(activation, field="activation_func_clamp_value", value=None),
    "the offset of up": functools.partial(activation, field="glu_linear_offset", value=0.0),
    "the gate's function": functools.partial(
        activation, field="activation_func", value=torch.nn.functional.silu
    ),
    "gate and up that alternate": side_by_side,
}


@pytest.mark.parametrize("part", PARTS)
@over(ONE)
def test_each_part_shows_in_the_logits(layout: Layout, part: str) -> None:
    assert_shows(layout, CASE, PARTS[part])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax_type": "vanilla"}, "softmax_type is 'vanilla', must be 'learnable'"),
        ({"window_size": None}, r"window_size is None, must be \(2, 0\)"),
        ({"window_attn_skip_freq": None}, r"window_layers is \[1, 1\], must be \[1, 0\]"),
        ({"window_attn_skip_freq": [0, 1]}, r"window_layers is \[0, 1\], must be \[1, 0\]"),
        ({"add_bias_linear": False}, "add_bias_linear is False, must be True"),
        ({"glu_linear_offset": 0.0}, "glu_linear_offset is 0.0, must be 1.0"),
        ({"activation_func_clamp_value": 7.0}, "clamp_value is 7.0, must be 0.4"),
        ({"activation_func": torch.nn.functional.silu}, "activation_func is 'silu', must be 'quic"),
        ({"yarn": {"yarn_rotary_scaling_factor": 4.0}}, "scaling_factor is 4.0, must be 8.0"),
        ({"yarn": {"yarn_beta_fast": 2.0}}, "yarn_beta_fast is 2.0, must be 1.0"),
        ({"yarn": {"yarn_mscale_all_dim": 0.5}}, "yarn_mscale_all_dim is 0.5, must be 0.0"),
        (
            {"yarn": {"yarn_correction_range_round_to_int": True}},
            "round_to_int is True, must be False",
        ),
        ({"yarn": {"yarn_original_max_position_embeddings": 16}}, "embeddings is 16, must be 8"),
    ],
    ids=str,
)
@over(ONE)
def test_a_model_built_with_other_options_is_refused(
    layout: Layout, changes: dict[str, Any], message: str
) -> None:
    directory, _ = reference(CASE)
    with model_parallel(layout):
        chunks = hf.build(layout, directory, **changes)
        with pytest.raises(ValueError, match=message):
            load_hf_base(chunks, directory)


@over(ONE)
def test_every_second_layer_may_have_the_window_by_a_number(layout: Layout) -> None:
    directory, expected = reference(CASE)
    with model_parallel(layout):
        chunks = hf.load(layout, directory, window_attn_skip_freq=2)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


# Those of the published models, and others by which transformers takes another path.
SCALINGS: list[dict[str, Any]] = [
    {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096},
    {"truncate": True, "beta_fast": 32.0, "beta_slow": 1.0},
    {"truncate": None, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_theta": 123.5, "mscale": 0.7, "mscale_all_dim": None},
]


@pytest.mark.parametrize("changes", SCALINGS, ids=str)
@over(ONE)
def test_yarn_scales_as_that_of_transformers(layout: Layout, changes: dict[str, Any]) -> None:
    config = hf_models.hf_config(CASE)
    config.rope_parameters = {**config.rope_parameters, **changes}
    expected = hf_models.hf_model_of(config).model.rotary_emb
    whole = {**config.to_dict(), "rope_parameters": config.rope_parameters}
    with model_parallel(layout):
        directory, _ = reference(CASE)
        scaled = yarn_options(megatron_args(whole))
        assert scaled.keys() == YARN.keys()
        chunk = hf.build(layout, directory, yarn=scaled)[0]
        set_rotary(chunk, whole)
        angles, _ = chunk.rotary_pos_emb(16)
    torch.testing.assert_close(angles[1, 0, 0, :8], expected.inv_freq)
    [factor] = {attention._yarn_concentration_factor for attention in attentions(chunk)}
    assert factor == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mlp.experts.gate_up_proj", lambda t: t[:, :, :-1], "gate and up of one size"),
        ("mlp.experts.down_proj", lambda t: t.flatten(1), r"expected \[experts, in, out\]"),
        ("mlp.experts.gate_up_proj_bias", lambda t: t[None], r"expected \[experts, out\]"),
        ("self_attn.sinks", lambda t: t[:2], r"misshapen model.layers.1.self_attn.sinks \[2\]"),
        ("mlp.router.bias", None, "is missing model.layers.1.mlp.router.bias"),
        ("mlp.experts.down_proj_bias", None, "is missing model.layers.1.mlp.experts.0.down_proj"),
    ],
)
@over(ONE)
def test_broken_tensors_are_named(
    layout: Layout, name: str, change: Any, message: str, tmp_path: Path
) -> None:
    directory = broken_copy(CASE, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensor = tensors.pop(f"model.layers.1.{name}")
    if change:
        tensors[f"model.layers.1.{name}"] = change(tensor).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with model_parallel(layout):
        chunks = hf.build(layout, reference(CASE)[0])
        with pytest.raises(ValueError, match=message):
            load_hf_base(chunks, directory)


@over(ONE)
def test_offsets_and_biases_are_frozen_and_in_no_checkpoint_of_adapters(layout: Layout) -> None:
    directory, _ = reference(CASE)
    with model_parallel(layout):
        [chunk] = apply_lora(hf.load(layout, directory), LoRAConfig(rank=4, targets=("all",)))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        saved = chunk.sharded_state_dict(metadata={"dp_cp_group": group})
    ends = ("softmax_offset", ".bias")
    own = [p for name, p in chunk.named_parameters() if name.endswith(ends)]
    assert len(own) == 2 * (4 + 2 * hf_models.NUM_EXPERTS)
    assert not any(p.requires_grad for p in own)
    assert saved
    assert not [name for name in saved if "_lora." not in name and name.endswith(ends)]
