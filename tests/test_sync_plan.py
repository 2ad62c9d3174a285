"""Layer by layer a server is given the very files that an export of the whole adapter has."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters import to_hf
from megalora.hf.peft import Format, write_adapter
from megalora.model.shape import ModelShape
from megalora.sync.plan import Plan
from tests.support.full_adapters import DENSE, MOE, megatron_adapter


def plan_of(
    tensors: Mapping[str, Tensor], config: LoRAConfig, shape: ModelShape, format: Format
) -> Plan:
    sizes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Plan(sizes, config, shape, format, base_model_name="base")


def by_layers(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield an adapter in pieces of a layer each, the last first."""
    pieces: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r"decoder\.layers\.\d+", name)
        pieces.setdefault(layer[0] if layer else "", {})[name] = tensor
    assert len(pieces) == 3
    yield from reversed(pieces.values())


def export(
    place: Path,
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    shape: ModelShape,
    format: Format,
    **options: Any,
) -> None:
    write_adapter(
        place,
        to_hf(tensors, config, shape, **options),
        base_model_name="base",
        format=format,
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts or None,
        moe_layers=shape.moe_layers or None,
    )


# 20 / 12 is no power of two, so that B has to be fp32 where it has the scale in it.
ODD, EVEN = LoRAConfig(rank=12, alpha=20.0), LoRAConfig(rank=8, alpha=32.0)
OUTER = LoRAConfig(rank=12, alpha=20.0, expert_mode="shared_outer")
# Of parts alone, by what they are not. Without attention the largest rank is the unembedding's.
PARTS = LoRAConfig(rank=8, targets=("attn", "experts.linear_fc1"))
EXPERTS = LoRAConfig(rank=8, targets=("mlp", "unembed"))
LEFT_OUT = {PARTS: "fc2", EXPERTS: "self_attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "config", "format"),
    [
        *((DENSE, ODD, format) for format in ("peft", "uniform", "tinker")),
        *((MOE, config, format) for config in (ODD, EVEN) for format in ("peft", "uniform")),
        *((MOE, ODD, "peft-3d"), (MOE, OUTER, "tinker"), (MOE, OUTER, "peft")),
        *((MOE, PARTS, format) for format in ("peft", "peft-3d", "uniform")),
        *((MOE, EXPERTS, format) for format in ("peft", "uniform")),
    ],
)
def test_layers_one_by_one_make_the_bytes_of_an_export(
    shape: ModelShape, config: LoRAConfig, format: Format, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {n: t.to(dtype) for n, t in megatron_adapter(shape, config).items()}
    left_out = LEFT_OUT.get(config, "nothing")
    tensors = {name: tensor for name, tensor in tensors.items() if left_out not in name}
    plan = plan_of(tensors, config, shape, format)
    target = tmp_path / "sync"
    target.mkdir()
    plan.write(target, (named for piece in by_layers(tensors) for named in plan.tensors(piece)))
    export(tmp_path / "export", tensors, config, shape, format)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (target / name).read_bytes() == (tmp_path / "export" / name).read_bytes(), name
    if format == "uniform" and config is ODD:
        dtypes = {t.dtype for t in load_file(target / "adapter_model.safetensors").values()}
        assert dtypes == {dtype, torch.float32}


def test_what_the_base_lost_to_its_start_values_is_in_each_layer(tmp_path: Path) -> None:
    config = LoRAConfig(rank=8, init="pissa")
    tensors = megatron_adapter(DENSE, config)
    start = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    plan = plan_of(tensors, config, DENSE, "peft")
    target = tmp_path / "sync"
    target.mkdir()
    pieces = by_layers(tensors)
    plan.write(target, (named for piece in pieces for named in plan.tensors(piece, start)))
    export(tmp_path / "export", tensors, config, DENSE, "peft", initial=start)
    names = ("adapter_model.safetensors", "adapter_config.json")
    found, expected = ([(tmp_path / d / n).read_bytes() for n in names] for d in ("sync", "export"))
    assert found == expected


@pytest.mark.bad_input("a number that is not one")
def test_values_that_are_not_finite_are_refused_by_name() -> None:
    tensors = megatron_adapter(MOE, EVEN)
    plan = plan_of(tensors, EVEN, MOE, "peft")
    tensors["decoder.layers.1.mlp.experts.linear_fc1_lora.lora_B"][3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*layers\.1\.mlp\.experts\.3\.gate_proj"):
        dict(named for piece in by_layers(tensors) for named in plan.tensors(piece))


def test_a_tensor_that_does_not_come_is_no_adapter(tmp_path: Path) -> None:
    tensors = megatron_adapter(DENSE, EVEN)
    plan = plan_of(tensors, EVEN, DENSE, "peft")
    first = next(by_layers(tensors))
    with pytest.raises(AssertionError, match="nothing came for"):
        plan.write(tmp_path, plan.tensors(first))
