"""Expert adapters over 3-D parameters (`peft-3d`), read: factors of single experts.

How they lie is in `peft_experts`. Megatron-Bridge leaves them [E, r, in] and [out, r, E].
PEFT <= 0.19.0 took `in` for `out`: there A is [E r, out], B is [in, r E], and the update of an
expert is (B A)ᵀ.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft_config import PeftRules
from megalora.model.family import Names
from megalora.model.shape import MAX_SIZES

Pair = tuple[Tensor, Tensor]


def split_3d(
    pairs: Mapping[str, Pair],
    rules: PeftRules,
    config: Mapping[str, Any],
    hidden_size: int | None,
    names: Names,
) -> dict[str, LoRAFactors]:
    """Turn the 3-D factors of every layer into factors of single experts.

    pairs: `model.layers.0.mlp.experts` or `model.layers.0.mlp.experts.base_layer` -> (A, B).
    hidden_size: tells the two layouts apart where a layer has only one of the two parameters.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for key in pairs:
        layers[key.removesuffix(".base_layer")].append(key)
    factors: dict[str, LoRAFactors] = {}
    projections, (first, _) = names.projections, names.parameters
    for prefix, keys in layers.items():
        named = {_parameter(key, keys, config, names): pairs[key] for key in sorted(keys)}
        old = _is_old_layout(prefix, named, hidden_size, names)
        for parameter, (a, b) in named.items():
            name = f"{prefix}.{parameter}"
            stacked = _unflatten(name, a, b, rules.rank(name), old=old)
            parts = projections[:-1] if parameter == first else projections[-1:]
            scale = rules.scale(name)
            factors |= split_experts(prefix, parts, *stacked, scale, alternate=names.interleaved)
    return factors


def _parameter(key: str, keys: list[str], config: Mapping[str, Any], names: Names) -> str:
    """Name the parameter of a wrapper: inner before outer where there are two."""
    inner, outer = names.parameters
    if len(keys) == 2:
        return inner if key.endswith(".base_layer") else outer
    named = {str(target).rpartition(".")[2] for target in config.get("target_parameters") or []}
    single = named & {inner, outer}
    if len(single) == 1 and not key.endswith(".base_layer"):
        return single.pop()
    raise ValueError(
        f"{key} adapts one expert parameter, but target_parameters {sorted(named)} do not say "
        f"which: {inner} or {outer}"
    )


def _is_old_layout(
    prefix: str, named: Mapping[str, Pair], hidden_size: int | None, names: Names
) -> bool:
    sizes = {name: (a.shape[-1], b.shape[0]) for name, (a, b) in named.items()}
    first, second = names.parameters
    gate_up, down, count = sizes.get(first), sizes.get(second), len(names.projections) - 1
    if gate_up and down:
        if gate_up[0] == down[1] and gate_up[1] == count * down[0]:
            return False
        if gate_up[1] == down[0] and gate_up[0] == count * down[1]:
            return True
        raise ValueError(f"{prefix}: sizes {sizes} fit neither layout of 3-D expert adapters")
    if names.interleaved:
        # PEFT took `in` and `out` as they are there, from the first.
        return False
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
    prefix: str,
    parts: Sequence[str],
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    alternate: bool = False,
) -> dict[str, LoRAFactors]:
    """Split stacked factors [E, r, in] and [E, out, r] into experts, and gate_up into gate and up.

    parts: the projections that are in them. gate_up made of two adapters has a block-diagonal B,
    and each half takes its own block. Trained as one adapter, both halves share A.
    alternate: rows of gate and up alternate.
    """
    if len(parts) == 1:
        halves = {parts[0]: (a, b)}
    else:
        one, other = parts
        rank = a.shape[1] // 2
        # Where the base is not known, the zeros of blocks tell.
        ways = [_halves(b, alternate=alternate), _halves(b, alternate=True)]
        even = a.shape[1] % 2 == 0
        found = next((way for way in ways if even and _are_blocks(*way, rank)), None)
        blocks, (gate, up) = found is not None, found or ways[0]
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


def _halves(b: Tensor, *, alternate: bool) -> Pair:
    """Return the rows of gate and those of up in [E, out, r]."""
    rows = b.shape[1] // 2
    return (b[:, ::2], b[:, 1::2]) if alternate else (b[:, :rows], b[:, rows:])


def _are_blocks(gate: Tensor, up: Tensor, rank: int) -> bool:
    """Say whether rows of gate read the first `rank` features of s alone, and up's all others."""
    return not (gate[..., rank:].any() or up[..., :rank].any())
