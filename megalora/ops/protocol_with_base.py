"""The ops that have the product with a frozen base weight in them (`ops.protocol`)."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class OpsWithBase(Protocol):
    """Linears, experts and gated MLPs with their adapters, one op each way."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        segments: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return y = x Wᵀ + s Bᵀ and s = scale * x Aᵀ, for a base weight W [out, in]."""
        ...

    def linear_backward(
        self,
        dy: Tensor,
        x: Tensor,
        s: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        segments: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx = dy W + ds A, dA = dsᵀ x and dB = dyᵀ s, where ds = scale * dy B.

        s is that of `linear`, which has the scale in it.
        """
        ...

    def linear_backward_(
        self,
        d_a: Tensor,
        d_b: Tensor,
        dy: Tensor,
        x: Tensor,
        s: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        segments: Sequence[int] = (),
    ) -> Tensor:
        """Return dx and add dA and dB to d_a and d_b in place, each fp32 or of dy's dtype."""
        ...

    def experts_linear(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor,
        segments: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return y and s of `linear` for experts, whose tokens x [n, in] are sorted by expert.

        weights: W [out, in] of each. s has zeros behind its columns up to a multiple of 8.
        """
        ...

    def experts_linear_backward(
        self,
        dy: Tensor,
        x: Tensor,
        s: Tensor,
        weights: Sequence[Tensor],
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor,
        segments: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dA and dB of `experts_linear`."""
        ...

    def experts_linear_backward_(
        self,
        d_a: Tensor,
        d_b: Tensor,
        dy: Tensor,
        x: Tensor,
        s: Tensor,
        weights: Sequence[Tensor],
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        offsets: Tensor,
        segments: Sequence[int] = (),
    ) -> Tensor:
        """Return dx, and add dA and dB to d_a and d_b, which are fp32 or of x's dtype."""
        ...

    def experts_linear_is_fused(self, weight: Tensor, experts: int, ranks: int) -> bool:
        """Say whether one launch computes so many experts with weights like this one.

        ranks: those of all projections. Elsewhere `experts_linear` is right and slow.
        """
        ...

    def gated_mlp(
        self,
        x: Tensor,
        weight1: Tensor,
        lora_A1: Tensor,
        lora_B1: Tensor,
        scale1: float,
        weight2: Tensor,
        lora_A2: Tensor,
        lora_B2: Tensor,
        scale2: float,
        segments: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return z of a gated MLP with the adapters of both its linears, and y, s1 and s2.

        [gate, up] and s1 are `linear` of x, z and s2 `linear` of a = silu(gate) up. y [..., 2 f]:
        gate and up on a CPU, x W1ᵀ on a GPU, for `gated_mlp_backward` on the same device.
        weights: [n], with which a of each token is multiplied. On a CPU in fp32 and fp64; on a GPU
        in bf16 and fp16, for ranks up to 32 and f in eights.
        """
        ...

    def gated_mlp_is_fused(self, weight2: Tensor, rank1: int, rank2: int) -> bool:
        """Say whether `gated_mlp` computes these and is the fastest way to do so.

        weight2: that of the second linear. rank1, rank2: of lora_B1 and lora_A2.
        """
        ...

    def gated_mlp_backward(
        self,
        dz: Tensor,
        x: Tensor,
        y: Tensor,
        s1: Tensor,
        s2: Tensor,
        weight1: Tensor,
        lora_A1: Tensor,
        lora_B1: Tensor,
        scale1: float,
        weight2: Tensor,
        lora_A2: Tensor,
        lora_B2: Tensor,
        scale2: float,
        segments: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dA and dB of the first and of the second, and d_weights of `gated_mlp`.

        d_weights has no elements where there are no weights.
        """
        ...

    def gated_mlp_backward_(
        self,
        d_a1: Tensor,
        d_b1: Tensor,
        d_a2: Tensor,
        d_b2: Tensor,
        dz: Tensor,
        x: Tensor,
        y: Tensor,
        s1: Tensor,
        s2: Tensor,
        weight1: Tensor,
        lora_A1: Tensor,
        lora_B1: Tensor,
        scale1: float,
        weight2: Tensor,
        lora_A2: Tensor,
        lora_B2: Tensor,
        scale2: float,
        segments: Sequence[int] = (),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return dx and d_weights; add dA and dB to the sums, each fp32 or of x's dtype."""
        ...
