"""The LoRA ops that layers call, whoever computes them.

Dense without `offsets` and grouped over experts with them.
`offsets`: int32 or int64 [E], the inclusive cumulative sum of tokens per expert, on x's device.
`segments`: the sizes of one period of output columns; block p of every period belongs to
projection p and reads rank block p of s. `()` means that all columns belong to one projection.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megalora.ops.protocol_with_base import OpsWithBase


class Ops(OpsWithBase, Protocol):
    """The functions that layers call. `seed`: int64 [1] on the device of x, needed where p > 0.

    Layers give all arguments by position: torch takes a microsecond for those given by name.
    """

    def shrink(
        self,
        x: Tensor,
        lora_A: Tensor,
        offsets: Tensor | None = None,
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
        p: float = 0.0,
        seed: Tensor | None = None,
    ) -> None:
        """Add dsᵀ dropout(x) to d_a in place, which is fp32 or of x's dtype."""
        ...

    def gate_(
        self,
        y: Tensor,
        s1: Tensor,
        lora_B1: Tensor,
        scale: float,
        lora_A2: Tensor,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return a = silu(gate) up, [..., f], and s2 = a A2ᵀ; [gate, up] = y + scale * s1 B1ᵀ.

        y [..., 2 f], contiguous: what is left in it is for `gate_backward_` on the same device.
        segments: none, or [f, f]. weights: [n], with which a of each token is multiplied. Computed
        where `gated_mlp` is.
        """
        ...

    def gate_backward_(
        self,
        da: Tensor,
        ds2: Tensor,
        y: Tensor,
        s1: Tensor,
        lora_B1: Tensor,
        scale: float,
        lora_A2: Tensor,
        offsets: Tensor | None = None,
        segments: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dy, ds1 = scale * dy B1, a once more and d_weights, by da + ds2 A2.

        What is left in da is nobody's. d_weights has no elements where there are no weights.
        """
        ...
