"""TransformerEngine's grouped linear as shapes: the linears of a rank's experts in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalora.plan.engine import base
from megalora.plan.engine.base import Kept
from megalora.plan.engine.kernels import ops
from megalora.plan.engine.linear import SplitLinear


class _Grouped(torch.autograd.Function):
    """y = x Wᵀ of each token's expert; x is kept where the weights are trained."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, fused: bool, *weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.fused = fused
        kept = x if weights[0].requires_grad else None
        ctx.save_for_backward(kept, *weights)  # type: ignore[arg-type]
        return ops.experts(x, weights)

    @staticmethod
    def backward(ctx: Kept, dy: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        dx = ops.experts_dgrad(dy, weights) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, *[None] * len(weights)
        if ctx.fused and hasattr(weights[0], "main_grad"):
            ops.experts_wgrad_(dy, x)
            return dx, None, *map(base.added, weights)
        return dx, None, *ops.experts_wgrad(dy, x, weights)


class GroupedLinear(SplitLinear):
    """Linears W [o, i] of `num_gemms` experts, over tokens sorted by expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        single_grouped_weight: bool = False,
        **how: Any,
    ) -> None:
        if single_grouped_weight:
            raise ValueError(
                "a plan has no experts in one weight: leave out --moe-single-grouped-weight"
            )
        self.num_gemms, self.single_grouped_weight = num_gemms, single_grouped_weight
        super().__init__(in_features, out_features, **how)

    def _add_parameters(self, where: dict[str, Any]) -> None:
        for index in range(self.num_gemms):
            shape = self.out_features, self.in_features
            weight = self.add_parameter(f"weight{index}", shape, **where)
            base.mark_split(weight, row=self.parallel_mode == "row")
            if self.use_bias:
                self.add_parameter(f"bias{index}", (self.out_features,), **where)

    def _of_all(self, name: str) -> list[Tensor]:
        return [self.get_parameter(f"{name}{index}") for index in range(self.num_gemms)]

    def forward(
        self,
        inp: Tensor,
        m_splits: Sequence[int] | Tensor,
        is_first_microbatch: bool | None = None,
        **_unused: object,
    ) -> Any:
        """Return y [tokens, o], with the biases beside it where they are to be returned."""
        weights = self._of_all("weight")
        y = _Grouped.apply(inp, self.fuse_wgrad_accumulation, *weights)
        return (y, self._of_all("bias")) if self.return_bias else y
