"""Adapters of one rank and one scale, for servers that read no patterns."""

from collections.abc import Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from megalora.adapters.finite import all_finite
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.files import Planned
from megalora.hf.peft_config import most_common


def largest_rank(factors: Iterable[LoRAFactors]) -> int:
    """Return the rank that all can have."""
    return max(module.rank for module in factors)


def one_rank_and_scale(factors: Collection[LoRAFactors]) -> tuple[int, float]:
    """Return the largest rank and the most common scale."""
    return largest_rank(factors), most_common((m.rank, m.scale) for m in factors)[1]


def at_one_scale(
    factors: Mapping[str, LoRAFactors], one: tuple[int, float] | None = None
) -> dict[str, LoRAFactors]:
    """Return the same updates at the largest rank and the most common scale.

    one: that rank and scale, where these are some of an adapter's factors.
    """
    rank, scale = one or one_rank_and_scale(factors.values())
    return {
        name: LoRAFactors(module.lora_A, module.folded_b(scale), scale).resized(rank)
        for name, module in factors.items()
    }


def uniform_tensors(
    factors: Mapping[str, LoRAFactors], rank: int | None = None
) -> dict[str, Planned]:
    """Return the same updates at the largest rank and scale 1 by key, each made when written.

    Scales are folded into B in fp32, and zeros appended.
    rank: the largest one, where these are some of an adapter's factors.
    Raises ValueError for a scale that carries B out of fp32, where scale * B @ A is not.
    """
    rank = rank or largest_rank(factors.values())
    planned: dict[str, Planned] = {}
    beyond = []
    for name, module in factors.items():
        a, b = module.lora_A, module.folded_b()
        if not all_finite(b):
            beyond.append(name)
        planned[f"{name}.lora_A.weight"] = Planned(
            (rank, a.shape[1]), a.dtype, partial(_padded_a, module, rank)
        )
        planned[f"{name}.lora_B.weight"] = Planned(
            (b.shape[0], rank), b.dtype, partial(_padded_b, module, rank, b.dtype)
        )
    if beyond:
        raise ValueError(
            f"adapter has NaN or infinite values in {summarise(beyond)} once lora_B has its scale "
            "in it, as the format `uniform` writes it: use the format `peft`"
        )
    return planned


def _padded_a(module: LoRAFactors, rank: int) -> Tensor:
    return functional.pad(module.lora_A, (0, 0, 0, rank - module.rank))


def _padded_b(module: LoRAFactors, rank: int, dtype: torch.dtype) -> Tensor:
    b = module.rescaled(1.0).lora_B.to(dtype)
    return functional.pad(b, (0, rank - module.rank))
