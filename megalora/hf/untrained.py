"""Adapters without an update, which stand where PEFT or a linear of Megatron insists on one."""

from collections.abc import Mapping

from megalora.adapters.finite import largest
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft_config import split_expert


def without_blanks(factors: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Leave out adapters whose A and B are zero, which no training starts from or ends in.

    They stand where PEFT insists on one. All are kept where there are no others.
    """
    used = {name: m for name, m in factors.items() if largest(m.lora_A) or largest(m.lora_B)}
    return used or dict(factors)


def without_untrained(factors: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Leave out projections whose B is zero, of experts those that no expert of a layer has.

    They stand beside others in one linear of Megatron. All are kept where there are no others.
    """
    trained = {_in_layer(name) for name, module in factors.items() if module.lora_B.any()}
    used = {name: module for name, module in factors.items() if _in_layer(name) in trained}
    return used or dict(factors)


def _in_layer(name: str) -> str:
    """Return a module's name without the number of an expert."""
    expert = split_expert(name)
    return f"{expert[0]}.{expert[2]}" if expert else name
