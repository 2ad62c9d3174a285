"""Mamba-2's in_proj where z and x alone have adapters, an A each: one adapter of Hugging Face's.

Hugging Face's in_proj has the rows [z; x; B; C; dt]. Its adapter has both A's, of twice the rank,
and a B of two blocks, with no update of B, C and dt. Here a part is called by the module and its
name, as `model.layers.0.mixer.in_proj.z`.
"""

from collections.abc import Mapping

import torch

from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors
from megalora.hf.joined import join_blocks, split_blocks
from megalora.hf.linears import MAMBA_IN_PROJ, locate
from megalora.model.facts import MAMBA_WIDE, mamba_parts
from megalora.model.shape import ModelShape
from megalora.targets import has_wide_parts_alone


def split_wide(
    factors: Mapping[str, LoRAFactors], config: LoRAConfig, shape: ModelShape
) -> dict[str, LoRAFactors]:
    """Return the factors of z and of x in place of those of in_proj, where each has an A.

    Raises ValueError where the others have an update, or where there are other rows.
    """
    found: dict[str, LoRAFactors] = {}
    for name, module in factors.items():
        layer, linear, *_ = locate(name, shape) or (None, None)
        if linear is None or not has_wide_parts_alone(linear.name(layer), config):
            found[name] = module
            continue
        _check_rows(name, module, shape)
        inner = mamba_parts(shape)["z"]
        rows = [module.lora_B[:inner], module.lora_B[inner : 2 * inner]]
        split = split_blocks(module, rows)
        found |= {f"{name}.{part}": each for part, each in zip(MAMBA_WIDE, split, strict=True)}
    return found


def join_wide(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> dict[str, LoRAFactors]:
    """Return the factors of in_proj in place of those of z and of x; see `split_wide`."""
    found: dict[str, LoRAFactors] = {}
    for name, module in factors.items():
        joined, _, part = name.rpartition(".")
        if part not in MAMBA_WIDE or not joined.endswith(MAMBA_IN_PROJ):
            found[name] = module
        elif part == MAMBA_WIDE[0]:
            both = [factors[f"{joined}.{each}"] for each in MAMBA_WIDE]
            found[joined] = _with_all_rows(both, shape)
    return found


def _with_all_rows(parts: list[LoRAFactors], shape: ModelShape) -> LoRAFactors:
    rows = mamba_parts(shape)
    both = join_blocks(parts, [rows[part] for part in MAMBA_WIDE], by_values=False)
    others = sum(size for part, size in rows.items() if part not in MAMBA_WIDE)
    b = torch.cat([both.lora_B, both.lora_B.new_zeros(others, both.rank)])
    return LoRAFactors(both.lora_A, b, both.scale)


def _check_rows(name: str, module: LoRAFactors, shape: ModelShape) -> None:
    rows = mamba_parts(shape)
    if module.lora_B.shape[0] != sum(rows.values()):
        raise ValueError(
            f"{name}: lora_B has {module.lora_B.shape[0]} rows, the model {sum(rows.values())}: "
            "the adapter belongs to another model"
        )
    if module.lora_B[2 * rows["z"] :].any():
        raise ValueError(
            f"{name}: lora_B has an update of B, C or dt, which the preset `tinker` leaves out: "
            "add in_proj to --lora-targets before it"
        )
