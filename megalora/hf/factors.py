"""The canonical form of an adapter, between the Megatron side and the files; what it may hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora.adapters.finite import FLOAT32_MAX, all_finite, largest, largest_update

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class LoRAFactors:
    """The update of one Hugging Face linear: W + scale * lora_B @ lora_A.

    lora_A: [r, in]. lora_B: [out, r].
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float

    def __post_init__(self) -> None:
        a, b = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
            raise ValueError(
                f"lora_A {list(a)} and lora_B {list(b)} do not fit: expected [r, in] and [out, r]"
            )

    @property
    def rank(self) -> int:
        """Rank r of the update."""
        return self.lora_A.shape[0]

    @property
    def num_parameters(self) -> int:
        """Elements of both factors."""
        return self.lora_A.numel() + self.lora_B.numel()

    def delta(self) -> Tensor:
        """Return the update scale * B @ A [out, in] in fp32 (fp64 factors stay fp64)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).mul_(self.scale)

    def resized(self, rank: int) -> "LoRAFactors":
        """Return the same update at a higher rank, zeros appended to both factors."""
        extra = rank - self.rank
        assert extra >= 0
        if extra == 0:
            return self
        a = torch.cat([self.lora_A, self.lora_A.new_zeros(extra, self.lora_A.shape[1])])
        b = torch.cat([self.lora_B, self.lora_B.new_zeros(self.lora_B.shape[0], extra)], dim=1)
        return LoRAFactors(a, b, self.scale)

    def trimmed(self) -> "LoRAFactors":
        """Return the same update without trailing ranks that are zero in both factors."""
        # Nearly all have none, and are asked for thousands of times: half the time of any().
        if largest(self.lora_A[-1]) or largest(self.lora_B[:, -1]):
            return self
        used = self.lora_A.ne(0).any(1) | self.lora_B.ne(0).any(0)
        rank = int(used.nonzero().max()) + 1 if used.any() else 1
        return LoRAFactors(self.lora_A[:rank], self.lora_B[:, :rank], self.scale)

    def rescaled(self, scale: float) -> "LoRAFactors":
        """Return the same update with another scale, the ratio folded into B in fp32.

        Equal scales leave B as it is, bit for bit.
        """
        if same_scale(self.scale, scale):
            return LoRAFactors(self.lora_A, self.lora_B, scale)
        dtype = torch.promote_types(self.lora_B.dtype, torch.float32)
        return LoRAFactors(self.lora_A, self.lora_B.to(dtype) * (self.scale / scale), scale)

    def folded_b(self, scale: float = 1.0) -> Tensor:
        """Return lora_B for another scale, in fp32 unless its own precision loses nothing."""
        b = self.rescaled(scale).lora_B
        short = b.to(self.lora_B.dtype)
        return short if short is b or torch.equal(short.to(b.dtype), b) else b


def same_scale(first: float, second: float) -> bool:
    """Say whether two scales are one, but for the rounding of alpha = scale * r and back."""
    return abs(first - second) <= 1e-12 * max(abs(first), abs(second))


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a tensor, by name, cannot be a factor: no matrix, no such precision.

    Integers, float8 and the like are codes of numbers, whose meaning another tensor holds.
    """
    wrong = [f"{name} {list(t.shape)}" for name, t in tensors.items() if t.dim() != 2]
    if wrong:
        raise ValueError(
            f"adapter has factors that are no matrices: {summarise(wrong)}: expected 2-D"
        )
    wrong = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in PRECISIONS]
    if wrong:
        raise ValueError(
            f"adapter has factors that are no floating-point numbers of 16 bits or more: "
            f"{summarise(wrong)}: save it as float32, bfloat16 or float16"
        )


def check_factors(factors: Mapping[str, LoRAFactors]) -> None:
    """Raise ValueError, by name, where factors cannot be used.

    Their precision must be one of `PRECISIONS`, factors and scales finite, and so the updates
    scale * B @ A in fp32.
    """
    for end in ("lora_A", "lora_B"):
        check_tensors({f"{name}.{end}": getattr(m, end) for name, m in factors.items()})
    bad, beyond = [], []
    for name, module in factors.items():
        if not math.isfinite(module.scale):
            bad.append(name)
            continue
        bound = largest_update(module.lora_A, module.lora_B, module.scale)
        # Few are above the bound, and only they are multiplied out.
        if bound < FLOAT32_MAX:
            continue
        if not (all_finite(module.lora_A) and all_finite(module.lora_B)):
            bad.append(name)
        elif not all_finite(module.delta().float()):
            beyond.append(name)
    if bad:
        raise ValueError(
            f"adapter has NaN or infinite values in {summarise(bad)}: "
            "use a checkpoint from before training diverged"
        )
    if beyond:
        raise ValueError(
            f"adapter has updates scale * B @ A beyond float32 in {summarise(beyond)}: its values "
            "or its alpha are not those of a trained adapter"
        )


def summarise(names: list[str], limit: int = 4) -> str:
    """Return the first names and how many more there are."""
    shown = ", ".join(names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown
