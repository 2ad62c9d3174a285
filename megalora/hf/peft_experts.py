"""Expert adapters over 3-D parameters (`peft-3d`), and the experts that PEFT insists on.

transformers 5 keeps a layer's experts as `mlp.experts.gate_up_proj` [E, 2 i, h] and
`mlp.experts.down_proj` [E, h, i]. PEFT wraps gate_up_proj first, so its factors are the inner
ones, at `mlp.experts.base_layer`, and those of down_proj the outer ones, at `mlp.experts`:
lora_A [E r, in] is expert-major, lora_B [out, r E] is expert-fastest; Megatron-Bridge leaves them
[E, r, in] and [out, r, E]. PEFT <= 0.19.0 took `in` for `out`: there A is [E r, out], B is
[in, r E], and the update of an expert is (B A)ᵀ.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.files import Planned
from megalora.hf.peft_config import PeftRules, layer_of, split_expert
from megalora.model.family import Projections
from megalora.model.shape import MAX_SIZES

GATE_UP, DOWN = "gate_up_proj", "down_proj"
Pair = tuple[Tensor, Tensor]


def split_3d(
    pairs: Mapping[str, Pair],
    rules: PeftRules,
    config: Mapping[str, Any],
    hidden_size: int | None,
    projections: Projections,
) -> dict[str, LoRAFactors]:
    """Turn the 3-D factors of every layer into factors of single experts.

    pairs: `model.layers.0.mlp.experts` or `model.layers.0.mlp.experts.base_layer` -> (A, B).
    hidden_size: tells the two layouts apart where a layer has only one of the two parameters.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for key in pairs:
        layers[key.removesuffix(".base_layer")].append(key)
    factors: dict[str, LoRAFactors] = {}
    for prefix, keys in layers.items():
        named = {_parameter(key, keys, config): pairs[key] for key in sorted(keys)}
        old = _is_old_layout(prefix, named, hidden_size)
        for parameter, (a, b) in named.items():
            name = f"{prefix}.{parameter}"
            stacked = _unflatten(name, a, b, rules.rank(name), old=old)
            parts = projections[:2] if parameter == GATE_UP else projections[2:]
            factors |= split_experts(prefix, parts, *stacked, rules.scale(name))
    return factors


def _parameter(key: str, keys: list[str], config: Mapping[str, Any]) -> str:
    """Name the parameter of a wrapper: inner before outer where there are two."""
    if len(keys) == 2:
        return GATE_UP if key.endswith(".base_layer") else DOWN
    named = {str(target).rpartition(".")[2] for target in config.get("target_parameters") or []}
    single = named & {GATE_UP, DOWN}
    if len(single) == 1 and not key.endswith(".base_layer"):
        return single.pop()
    raise ValueError(
        f"{key} adapts one expert parameter, but target_parameters {sorted(named)} do not say "
        f"which: {GATE_UP} or {DOWN}"
    )


def _is_old_layout(prefix: str, named: Mapping[str, Pair], hidden_size: int | None) -> bool:
    sizes = {name: (a.shape[-1], b.shape[0]) for name, (a, b) in named.items()}
    gate_up, down = sizes.get(GATE_UP), sizes.get(DOWN)
    if gate_up and down:
        if gate_up[0] == down[1] and gate_up[1] == 2 * down[0]:
            return False
        if gate_up[1] == down[0] and gate_up[0] == 2 * down[1]:
            return True
        raise ValueError(f"{prefix}: sizes {sizes} fit neither layout of 3-D expert adapters")
    hidden = (gate_up or down or (0, 0))[0 if gate_up else 1]
    other = (gate_up or down or (0, 0))[1 if gate_up else 0]
    if hidden_size is None or hidden == other or hidden_size not in (hidden, other):
        raise ValueError(
            f"{prefix}: sizes {sizes} alone do not tell the layout of PEFT <= 0.19.0 from the "
            "newer one: give the base model, or save the adapter again with a newer PEFT"
        )
    return hidden != hidden_size


def _unflatten(name: str, a: Tensor, b: Tensor, rank: int, *, old: bool) -> Pair:
    """Return A [E, r, in] and B [E, out, r] of a flat pair."""
    ranks = {rank, *a.shape[1:-1], *b.shape[1:-1]}
    a, b = a.flatten(0, -2), b.flatten(1)
    if len(ranks) != 1 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        raise ValueError(
            f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not whole experts of "
            f"rank {rank}: the configuration's rank belongs to other tensors"
        )
    num_experts = a.shape[0] // rank
    if num_experts > MAX_SIZES["num_moe_experts"]:
        raise ValueError(
            f"{name}: lora_A {list(a.shape)} has {num_experts:,} experts of rank {rank}: "
            f"{MAX_SIZES['num_moe_experts']:,} at most"
        )
    a = a.reshape(num_experts, rank, a.shape[1])
    b = b.reshape(b.shape[0], rank, num_experts).permute(2, 0, 1)
    return (b.transpose(1, 2), a.transpose(1, 2)) if old else (a, b)


def split_experts(
    prefix: str, parts: Sequence[str], a: Tensor, b: Tensor, scale: float
) -> dict[str, LoRAFactors]:
    """Split stacked factors [E, r, in] and [E, out, r] into experts, and gate_up into gate and up.

    parts: the projections that are in them. gate_up made of two adapters has a block-diagonal B,
    and each half takes its own block. Trained as one adapter, both halves share A.
    """
    if len(parts) == 1:
        halves = {parts[0]: (a, b)}
    else:
        one, other = parts
        rank, rows = a.shape[1] // 2, b.shape[1] // 2
        gate, up = b[:, :rows], b[:, rows:]
        blocks = a.shape[1] % 2 == 0 and not (gate[..., rank:].any() or up[..., :rank].any())
        halves = (
            {one: (a[:, :rank], gate[..., :rank]), other: (a[:, rank:], up[..., rank:])}
            if blocks
            else {one: (a, gate), other: (a, up)}
        )
    return {
        f"{prefix}.{expert}.{projection}": LoRAFactors(half_a[expert], half_b[expert], scale)
        for projection, (half_a, half_b) in halves.items()
        for expert in range(a.shape[0])
    }


@dataclass(frozen=True, slots=True)
class Experts:
    """The expert adapters of the layers that have any: complete, of one rank and one scale."""

    prefixes: list[str]
    projections: Projections
    num_experts: int
    rank: int
    scale: float
    factors: dict[str, LoRAFactors]


def complete_experts(
    factors: Mapping[str, LoRAFactors],
    moe_layers: Collection[int],
    num_experts: int | None,
    *,
    projections: Projections,
    must_agree: bool = True,
) -> Experts | None:
    """Fill the experts' adapters to what PEFT loads: all experts of a layer, all projections.

    PEFT's conversion stacks them, so a projection without an adapter gets one that is zero. A layer
    of which no expert has an adapter gets none. Returns None where that holds of all layers.
    must_agree: raise ValueError where they differ in scale; that of the result is else one of them.
    """
    given = {name: module for name, module in factors.items() if split_expert(name)}
    if not given:
        return None
    parts = [part for name in given if (part := split_expert(name))]
    if num_experts is None:
        num_experts = max(expert for _, expert, _ in parts) + 1
    _check_inside(given, moe_layers, num_experts, projections)
    scale = next(iter(given.values())).scale
    if must_agree and not all(same_scale(module.scale, scale) for module in given.values()):
        raise ValueError(
            "experts differ in scale, which PEFT cannot load as `peft` or `peft-3d`: use the "
            "format `uniform`"
        )
    rank = max(module.rank for module in given.values())
    blank = _blank_factors(given, rank, scale, projections)
    prefixes = sorted({prefix for prefix, _, _ in parts}, key=lambda prefix: layer_of(prefix) or 0)
    full = {
        name: given[name].resized(rank) if name in given else blank[projection]
        for prefix in prefixes
        for expert in range(num_experts)
        for projection in projections
        for name in [f"{prefix}.{expert}.{projection}"]
    }
    return Experts(prefixes, projections, num_experts, rank, scale, full)


def _check_inside(
    names: Iterable[str],
    moe_layers: Collection[int],
    num_experts: int,
    projections: Projections,
) -> None:
    for name in names:
        part = split_expert(name)
        if part and part[2] not in projections:
            raise ValueError(
                f"{name} is none of {', '.join(projections)}, which the experts of this base have: "
                "this adapter belongs to another model"
            )
        if part and (layer_of(name) not in moe_layers or part[1] >= num_experts):
            raise ValueError(
                f"{name} is outside of the {len(moe_layers)} layers with {num_experts} experts: "
                "this adapter belongs to another model"
            )


def _blank_factors(
    given: Mapping[str, LoRAFactors], rank: int, scale: float, projections: Projections
) -> dict[str, LoRAFactors]:
    """Return a zero adapter for each projection, sized like the ones that are given."""
    name, module = next(iter(given.items()))
    inner, outer = module.lora_A.shape[1], module.lora_B.shape[0]
    gate, up, down = projections
    hidden, ffn = (outer, inner) if name.endswith(f".{down}") else (inner, outer)

    def zero(num_in: int, num_out: int) -> LoRAFactors:
        return LoRAFactors(
            module.lora_A.new_zeros(rank, num_in), module.lora_B.new_zeros(num_out, rank), scale
        )

    blank = zero(hidden, ffn)
    return {gate: blank, up: blank, down: zero(ffn, hidden)}


def join_3d(experts: Experts) -> dict[str, Planned]:
    """Return the 3-D layout's tensors by key; gate and up become block-diagonal at rank 2 r.

    Each is made when it is written.
    """
    down = experts.factors[f"{experts.prefixes[0]}.0.{experts.projections[2]}"]
    hidden, ffn = down.lora_B.shape[0], down.lora_A.shape[1]
    ranks = experts.num_experts * experts.rank
    planned: dict[str, Planned] = {}
    for prefix in experts.prefixes:
        gate, up, down = (_modules(experts, prefix, part) for part in experts.projections)
        for end, shape, modules, make in (
            ("base_layer.lora_A", (2 * ranks, hidden), gate + up, partial(_gate_up_a, gate, up)),
            ("base_layer.lora_B", (2 * ffn, 2 * ranks), gate + up, partial(_gate_up_b, gate, up)),
            ("lora_A", (ranks, ffn), down, partial(_down_a, down)),
            ("lora_B", (hidden, ranks), down, partial(_down_b, down)),
        ):
            # Mixed precisions join at the highest.
            dtypes = {getattr(module, end[-6:]).dtype for module in modules}
            dtype = reduce(torch.promote_types, dtypes)
            planned[f"{prefix}.{end}.weight"] = Planned(shape, dtype, make)
    return planned


def _modules(experts: Experts, prefix: str, projection: str) -> list[LoRAFactors]:
    return [
        experts.factors[f"{prefix}.{expert}.{projection}"] for expert in range(experts.num_experts)
    ]


def _gate_up_a(gate: list[LoRAFactors], up: list[LoRAFactors]) -> Tensor:
    return torch.cat([_stack_a(gate), _stack_a(up)], dim=1).flatten(0, 1)


def _gate_up_b(gate: list[LoRAFactors], up: list[LoRAFactors]) -> Tensor:
    one, other = _stack_b(gate), _stack_b(up)
    rows = [
        torch.cat([one, torch.zeros_like(one)], dim=2),
        torch.cat([torch.zeros_like(other), other], dim=2),
    ]
    return _flat_b(torch.cat(rows, dim=1))


def _down_a(down: list[LoRAFactors]) -> Tensor:
    return _stack_a(down).flatten(0, 1)


def _down_b(down: list[LoRAFactors]) -> Tensor:
    return _flat_b(_stack_b(down))


def _stack_a(modules: list[LoRAFactors]) -> Tensor:
    return torch.stack([module.lora_A for module in modules])


def _stack_b(modules: list[LoRAFactors]) -> Tensor:
    return torch.stack([module.lora_B for module in modules])


def _flat_b(b: Tensor) -> Tensor:
    """Return [out, r E] of [E, out, r]."""
    return b.permute(1, 2, 0).flatten(1)
