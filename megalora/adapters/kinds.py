"""The kinds of adapters: which factors each has, and the A and B that they amount to.

A new kind is a class like `LoRA` in a file of its own, with an entry in `KINDS`; everything else
(shards, start values, gradients, checkpoints, gathering, merging) follows from its factors.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megalora.adapters.factors import Axis, Factor
from megalora.adapters.start import draw_uniform


class Kind(Protocol):
    """A kind of adapter: y += c B A x, with A and B made of its factors."""

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The tensors of one adapter, in the order of its parameters."""
        ...

    def pair(self, own: Mapping[str, torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return this rank's A [(E,) P r, i/t] and B [(E,) o/t, r], differentiable.

        own: this rank's shards of the factors, by name.
        """
        ...


class LoRA:
    """A and B are factors themselves; A starts as PEFT's does, B as zero."""

    factors = (
        Factor("lora_A", (Axis.RANKS, Axis.INPUT), draw_uniform),
        Factor("lora_B", (Axis.OUTPUT, Axis.RANK), 0.0),
    )

    def pair(self, own: Mapping[str, torch.nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Return both as they are."""
        return own["lora_A"], own["lora_B"]


KINDS: dict[str, Kind] = {"lora": LoRA()}


def kind_named(name: str) -> Kind:
    """Return the kind that a configuration names; ValueError where there is none."""
    if name not in KINDS:
        raise ValueError(
            f"lora_kind is {name!r}: it must be one of {sorted(KINDS)}, to which "
            "megalora.adapters.kinds.KINDS adds yours"
        )
    return KINDS[name]
