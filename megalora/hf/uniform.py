"""Adapters of one rank and of scale 1, for servers that read no patterns (`uniform`)."""

from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional

from megalora.hf.factors import LoRAFactors, check_each
from megalora.hf.files import Planned


def uniform_tensors(factors: Mapping[str, LoRAFactors], rank: int) -> dict[str, Planned]:
    """Return the same updates at one rank and scale 1 by key, each made when it is written.

    rank: no lower than that of any module. Scales are folded into B in fp32, and zeros appended.
    Raises ValueError for a scale that carries B out of fp32, where scale * B @ A is not.
    """
    planned: dict[str, Planned] = {}

    def plan() -> Iterator[tuple[str, LoRAFactors]]:
        for name, module in factors.items():
            one = module.folded()
            a, b = one.lora_A, one.lora_B
            planned[f"{name}.lora_A.weight"] = Planned(
                (rank, a.shape[1]), a.dtype, partial(_padded_a, module, rank)
            )
            planned[f"{name}.lora_B.weight"] = Planned(
                (b.shape[0], rank), b.dtype, partial(_padded_b, module, rank)
            )
            yield name, one

    check_each(plan())
    return planned


def _padded_a(module: LoRAFactors, rank: int) -> Tensor:
    return functional.pad(module.lora_A, (0, 0, 0, rank - module.rank))


def _padded_b(module: LoRAFactors, rank: int) -> Tensor:
    return functional.pad(module.folded().lora_B, (0, rank - module.rank))
