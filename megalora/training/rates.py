"""The learning rates and epsilons of lora_A and lora_B, as Megatron's optimizer takes them."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megalora.config import LoRAConfig

if TYPE_CHECKING:
    from megatron.core.optimizer import ParamGroupOverride, ParamKey


class Rates(Protocol):
    """Megatron's rates, as its args and its OptimizerConfig have them."""

    lr: float
    min_lr: float | None
    decoupled_lr: float | None
    decoupled_min_lr: float | None


def check_rates(config: LoRAConfig, args: Mapping[str, Any]) -> None:
    """Raise ValueError where a rate of Megatron's is not finite, or lr_ratio times that rate."""
    for name in ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr"):
        rate = args.get(name)
        if rate is not None and not math.isfinite(rate * config.lr_ratio):
            raise ValueError(
                f"{name} is {rate:g} for lora_A and {rate * config.lr_ratio:g} for lora_B, at "
                f"lora_lr_ratio {config.lr_ratio:g}: both must be finite"
            )


def factor_overrides(config: LoRAConfig, args: Rates) -> "dict[ParamKey, ParamGroupOverride]":
    """Return Megatron's optimizer overrides for lora_A and lora_B.

    --decoupled-lr, Megatron's rate of the embedding and the output layer, is the rate of the
    unembedding's adapter: that is what is trained of them.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    min_lr = args.min_lr or 0.0
    rates = {False: (args.lr, min_lr), True: (args.lr, min_lr)}
    if args.decoupled_lr is not None:
        decoupled_min_lr = min_lr if args.decoupled_min_lr is None else args.decoupled_min_lr
        rates[True] = args.decoupled_lr, decoupled_min_lr
    overrides = {}
    for (is_output, (lr, least)), (factor, eps, ratio) in itertools.product(
        rates.items(),
        (("lora_A", config.eps_a, 1.0), ("lora_B", config.eps_b, config.lr_ratio)),
    ):
        change: dict[str, float] = {} if eps is None else {"eps": eps}
        if (lr * ratio, least * ratio) != (args.lr, min_lr):
            change |= {"max_lr": lr * ratio, "min_lr": least * ratio}
        if change:
            predicate = ParamWithNamePredicate(
                name=f"{factor} of the unembedding" if is_output else factor,
                fn=functools.partial(_is_factor, factor, is_output),
            )
            overrides[ParamKey(with_name_predicate=predicate)] = change
    return overrides


def _is_factor(factor: str, is_output: bool, param: torch.nn.Parameter, name: str) -> bool:
    return getattr(param, "lora_factor", None) == factor and is_output == (
        "output_layer_lora." in name
    )
