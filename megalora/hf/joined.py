"""Modules of Hugging Face's whose parts have adapters of their own in Megatron.

Phi-3's `qkv_proj` and `gate_up_proj` join what most families have apart. A delta net's
`in_proj_qkv` joins query, key and value: one A there, three here. Where all three
are one, so is the joined adapter; else it has them all, of three times the rank, and a B of blocks
of which each reads its own. Here a part is called by its module and Megatron's name for it, as
`model.layers.0.linear_attn.in_proj_qkv.query`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megalora.adapters.rows import join_projections, split_projections
from megalora.hf.factors import LoRAFactors
from megalora.model.facts import part_rows
from megalora.model.families import names_of
from megalora.model.family import without_numbers
from megalora.model.shape import ModelShape


def split_joined(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> dict[str, LoRAFactors]:
    """Return the factors of parts in place of those of the modules that join them.

    Each part takes its block where B consists of blocks, and else the whole A. Raises ValueError
    where a module has other rows than the model.
    """
    found: dict[str, LoRAFactors] = {}
    for name, module in factors.items():
        if (parts := _parts_of(name, shape)) is None:
            found[name] = module
            continue
        period = _period(parts, shape)
        rows, own = module.lora_B.shape[0], sum(part_rows(shape)[part] for part in parts)
        if rows != own:
            raise ValueError(
                f"{name}: lora_B has {rows} rows, the model {own}: the adapter belongs to another "
                "model"
            )
        split = split_blocks(module, split_projections(module.lora_B, period))
        found |= {f"{name}.{part}": each for part, each in zip(parts, split, strict=True)}
    return found


def join_parts(
    factors: Mapping[str, LoRAFactors], shape: ModelShape, *, by_values: bool
) -> dict[str, LoRAFactors]:
    """Return the factors of modules in place of those of their parts; see `split_joined`.

    by_values: parts whose A's have the same values become one adapter of their rank; else only
    those that have one A.
    """
    found: dict[str, LoRAFactors] = {}
    modules: dict[str, dict[str, LoRAFactors]] = defaultdict(dict)
    for name, module in factors.items():
        joined, _, part = name.rpartition(".")
        parts = _parts_of(joined, shape) or ()
        if part not in parts:
            found[name] = module
            continue
        modules[joined][part] = module
        # Where the first of its parts is.
        found.setdefault(joined, module)
    for name, given in modules.items():
        parts = _parts_of(name, shape) or ()
        joined, period = [given[part] for part in parts], _period(parts, shape)
        found[name] = join_blocks(joined, period, by_values=by_values)
    return found


def _parts_of(name: str, shape: ModelShape) -> tuple[str, ...] | None:
    """Return the parts that a module joins, None where it is one of its own."""
    names = names_of(shape.model_type)
    pattern, _ = without_numbers(name)
    parts = names.joined.get(pattern.removeprefix(names.layer), ())
    return parts if len(parts) > 1 else None


def _period(parts: Sequence[str], shape: ModelShape) -> list[int]:
    """Return how many rows of each part follow one another, and so on again for each key head."""
    by_head = names_of(shape.model_type).joined_by_head
    count = shape.linear_num_key_heads if by_head else 1
    return [part_rows(shape)[part] // count for part in parts]


def split_blocks(module: LoRAFactors, rows: Sequence[Tensor]) -> list[LoRAFactors]:
    """Return an adapter for each part, of its rows of B and of its block of A where it has one."""
    rank, rest = divmod(module.rank, len(rows))
    blocks = [slice(number * rank, (number + 1) * rank) for number in range(len(rows))]
    if rest or any(_outside(b, block).any() for b, block in zip(rows, blocks, strict=True)):
        return [LoRAFactors(module.lora_A, b, module.scale) for b in rows]
    return [
        LoRAFactors(module.lora_A[block], b[:, block], module.scale)
        for b, block in zip(rows, blocks, strict=True)
    ]


def _outside(b: Tensor, block: slice) -> Tensor:
    return torch.cat([b[:, : block.start], b[:, block.stop :]], dim=1)


def join_blocks(
    parts: Sequence[LoRAFactors], period: Sequence[int], by_values: bool
) -> LoRAFactors:
    """Return one adapter of several parts' rows; see `join_parts`."""
    first, *others = parts
    others = [part.rescaled(first.scale) for part in others]
    if all(_is_one(first.lora_A, part.lora_A, by_values) for part in others):
        rows = [part.lora_B for part in (first, *others)]
        return LoRAFactors(first.lora_A, join_projections(rows, period), first.scale)
    rank = sum(part.rank for part in parts)
    rows, column = [], 0
    for part in (first, *others):
        b = part.lora_B.new_zeros(part.lora_B.shape[0], rank)
        b[:, column : column + part.rank] = part.lora_B
        rows.append(b)
        column += part.rank
    a = torch.cat([part.lora_A for part in parts])
    return LoRAFactors(a, join_projections(rows, period), first.scale)


def _is_one(one: Tensor, other: Tensor, by_values: bool) -> bool:
    """Say whether two A's are one; those without values are where they are one tensor."""
    if one is other:
        return True
    return by_values and not one.is_meta and one.shape == other.shape and torch.equal(one, other)
