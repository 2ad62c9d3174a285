"""Expert adapters over 3-D parameters (`peft-3d`), and the experts that PEFT insists on.

transformers 5 keeps a layer's experts as `mlp.experts.gate_up_proj` [E, 2 i, h] and
`mlp.experts.down_proj` [E, h, i]; without a gate the former is `up_proj` [E, i, h]. PEFT wraps it
first, so its factors are the inner ones, at `mlp.experts.base_layer`, and those of down_proj the
outer ones, at `mlp.experts`: lora_A [E r, in] is expert-major, lora_B [out, r E] is expert-fastest.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from megalora.hf.factors import LoRAFactors, same_scale
from megalora.hf.files import Planned
from megalora.hf.peft_config import layer_of, split_expert
from megalora.model.family import Names


@dataclass(frozen=True, slots=True)
class Experts:
    """The expert adapters of the layers that have any: complete, of one rank and one scale."""

    prefixes: list[str]
    names: Names
    num_experts: int
    rank: int
    scale: float
    factors: dict[str, LoRAFactors]

    @property
    def num_stacked(self) -> int:
        """How many projections the first of a layer's two tensors stacks: gate and up, or up."""
        return len(self.names.projections) - 1


def complete_experts(
    factors: Mapping[str, LoRAFactors],
    moe_layers: Collection[int],
    num_experts: int | None,
    *,
    names: Names,
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
    _check_inside(given, moe_layers, num_experts, names)
    scale = next(iter(given.values())).scale
    if must_agree and not all(same_scale(module.scale, scale) for module in given.values()):
        raise ValueError(
            "experts differ in scale, which PEFT cannot load as `peft` or `peft-3d`: use the "
            "format `uniform`"
        )
    rank = max(module.rank for module in given.values())
    blank = _blank_factors(given, rank, scale, names)
    prefixes = sorted({prefix for prefix, _, _ in parts}, key=lambda prefix: layer_of(prefix) or 0)
    full = {
        name: given[name].resized(rank) if name in given else blank[projection]
        for prefix in prefixes
        for expert in range(num_experts)
        for projection in names.projections
        for name in [f"{prefix}.{expert}.{projection}"]
    }
    return Experts(prefixes, names, num_experts, rank, scale, full)


def _check_inside(
    given: Iterable[str],
    moe_layers: Collection[int],
    num_experts: int,
    names: Names,
) -> None:
    for name in given:
        part = split_expert(name)
        if part and part[2] not in names.projections:
            raise ValueError(
                f"{name} is none of {', '.join(names.projections)}, which the experts of this base "
                "have: this adapter belongs to another model"
            )
        if part and (layer_of(name) not in moe_layers or part[1] >= num_experts):
            raise ValueError(
                f"{name} is outside of the {len(moe_layers)} layers with {num_experts} experts: "
                "this adapter belongs to another model"
            )


def _blank_factors(
    given: Mapping[str, LoRAFactors], rank: int, scale: float, names: Names
) -> dict[str, LoRAFactors]:
    """Return a zero adapter for each projection, sized like the ones that are given."""
    name, module = next(iter(given.items()))
    inner, outer = module.lora_A.shape[1], module.lora_B.shape[0]
    *stacked, down = names.projections
    hidden, ffn = (outer, inner) if name.endswith(f".{down}") else (inner, outer)

    def zero(num_in: int, num_out: int) -> LoRAFactors:
        return LoRAFactors(
            module.lora_A.new_zeros(rank, num_in), module.lora_B.new_zeros(num_out, rank), scale
        )

    blank = zero(hidden, ffn)
    return {**dict.fromkeys(stacked, blank), down: zero(ffn, hidden)}


def join_3d(experts: Experts) -> dict[str, Planned]:
    """Return the 3-D layout's tensors by key; gate and up become block-diagonal at rank 2 r.

    Each is made when it is written.
    """
    *_, down_name = experts.names.projections
    down = experts.factors[f"{experts.prefixes[0]}.0.{down_name}"]
    hidden, ffn, count = down.lora_B.shape[0], down.lora_A.shape[1], experts.num_stacked
    ranks, alternate = experts.num_experts * experts.rank, experts.names.interleaved
    planned: dict[str, Planned] = {}
    for prefix in experts.prefixes:
        *parts, down = (_modules(experts, prefix, part) for part in experts.names.projections)
        stacked = [module for part in parts for module in part]
        for end, shape, modules, make in (
            ("base_layer.lora_A", (count * ranks, hidden), stacked, partial(_joined_a, parts)),
            (
                "base_layer.lora_B",
                (count * ffn, count * ranks),
                stacked,
                partial(_joined_b, parts, alternate=alternate),
            ),
            ("lora_A", (ranks, ffn), down, partial(_joined_a, [down])),
            ("lora_B", (hidden, ranks), down, partial(_joined_b, [down])),
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


def _joined_a(parts: Sequence[list[LoRAFactors]]) -> Tensor:
    """Return [E P r, in] of the experts' P projections."""
    stacked = [torch.stack([module.lora_A for module in part]) for part in parts]
    return torch.cat(stacked, dim=1).flatten(0, 1)


def _joined_b(parts: Sequence[list[LoRAFactors]], *, alternate: bool = False) -> Tensor:
    """Return [P out, P r E], whose rows read the rank of their own projection alone.

    alternate: rows of the projections alternate; else one follows the other.
    """
    stacked = [torch.stack([module.lora_B for module in part]) for part in parts]
    rows = [
        torch.cat(
            [b if other == own else torch.zeros_like(b) for other in range(len(parts))], dim=2
        )
        for own, b in enumerate(stacked)
    ]
    whole = torch.stack(rows, dim=2).flatten(1, 2) if alternate else torch.cat(rows, dim=1)
    return whole.permute(1, 2, 0).flatten(1)
