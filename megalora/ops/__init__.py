"""Choose the implementation of the LoRA ops: `fused` (C++ and CUDA) or `reference` (plain torch).

Both have the same functions, dense without `offsets` and grouped over experts with them.
`offsets`: int32 or int64 [E], the inclusive cumulative sum of tokens per expert, on x's device.
`segments`: the sizes of one period of output columns; block p of every period belongs to
projection p and reads rank block p of s. `()` means that all columns belong to one projection.
"""

import os
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

ENVIRONMENT = "MEGALORA_OPS"


class Ops(Protocol):
    """The functions that layers call. `seed`: int64 [1] on the device of x, needed where p > 0."""

    def shrink(
        self,
        x: Tensor,
        lora_A: Tensor,
        offsets: Tensor | None = None,
        *,
        p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Return s = dropout(x) Aᵀ."""
        ...

    def expand_(
        self,
        y: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> None:
        """Add scale * s Bᵀ to y in place."""
        ...

    def expand_dgrad(
        self,
        dy: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> Tensor:
        """Return ds = scale * dy B."""
        ...

    def expand_wgrad(
        self,
        dy: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> Tensor:
        """Return dB = scale * dyᵀ s."""
        ...

    def expand_backward(
        self,
        dy: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return ds and dB, reading dy once where that is faster."""
        ...

    def shrink_dgrad_(
        self,
        dx: Tensor,
        ds: Tensor,
        lora_A: Tensor,
        offsets: Tensor | None = None,
        *,
        p: float = 0.0,
        seed: Tensor | None = None,
    ) -> None:
        """Add dropout(ds A) to dx in place."""
        ...

    def shrink_wgrad(
        self,
        ds: Tensor,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Return dA = dsᵀ dropout(x)."""
        ...

    def expand_wgrad_(
        self,
        d_b: Tensor,
        dy: Tensor,
        s: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> None:
        """Add scale * dyᵀ s to d_b in place, which is fp32 or of dy's dtype."""
        ...

    def expand_backward_(
        self,
        d_b: Tensor,
        dy: Tensor,
        s: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
    ) -> Tensor:
        """Return ds and add dB to d_b in place, reading dy once where that is faster."""
        ...

    def shrink_wgrad_(
        self,
        d_a: Tensor,
        ds: Tensor,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        p: float = 0.0,
        seed: Tensor | None = None,
    ) -> None:
        """Add dsᵀ dropout(x) to d_a in place, which is fp32 or of x's dtype."""
        ...


def backend(name: str) -> Ops:
    """Return the ops called `fused` or `reference`; MEGALORA_OPS in the environment overrides.

    The fused library is loaded here, not on import: `reference` works where nothing is built.
    """
    name = os.environ.get(ENVIRONMENT) or name
    if name == "fused":
        from megalora.ops import fused

        return fused
    if name == "reference":
        from megalora.ops import reference

        return reference
    raise ValueError(f"ops backend {name!r} is unknown: use 'fused' or 'reference'")
