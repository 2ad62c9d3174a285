"""TransformerEngine's linears, with and without a layer norm before them, as shapes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.plan.engine import base, norms
from megalora.plan.engine.base import Device, Kept, TransformerEngineBaseModule


@dataclass(frozen=True, slots=True)
class How:
    """How a linear is split, and who sums its weight's gradient.

    mode: column, row or None. tokens: shards of tokens are gathered before a column linear and
    scattered behind a row linear (sequence parallelism). fused: gradients go to main_grad.
    """

    mode: str | None
    group: ProcessGroup | None
    tokens: bool
    fused: bool

    def before(self, x: Tensor) -> Tensor:
        """Return the tokens that the product reads."""
        if self.group is not None and self.tokens and self.mode == "column":
            return base.gather(x, self.group)
        return x

    def after(self, y: Tensor) -> Tensor:
        """Sum what a row linear's ranks have computed."""
        if self.group is None or self.group.size() == 1 or self.mode != "row":
            return y
        if self.tokens:
            return base.reduce_scatter(y, self.group)
        dist.all_reduce(y, group=self.group)
        return y

    def gradient_before(self, dy: Tensor) -> Tensor:
        """Return the gradient of the product's output."""
        if self.group is not None and self.tokens and self.mode == "row":
            return base.gather(dy, self.group)
        return dy

    def gradient_after(self, dx: Tensor) -> Tensor:
        """Sum what a column linear's ranks have computed of the gradient of their input."""
        if self.group is None or self.group.size() == 1 or self.mode != "column":
            return dx
        if self.tokens:
            return base.reduce_scatter(dx, self.group)
        dist.all_reduce(dx, group=self.group)
        return dx


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + bias; x is kept where W is trained."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, x: Tensor, weight: Tensor, bias: Tensor | None, how: How
    ) -> Tensor:
        ctx.how, ctx.has_bias = how, bias is not None
        kept = x if weight.requires_grad else None
        ctx.save_for_backward(kept, weight)  # type: ignore[arg-type]
        return how.after(base.product(how.before(x), weight))

    @staticmethod
    def backward(ctx: Kept, dy: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        how: How = ctx.how
        dy = how.gradient_before(dy)
        dx = d_weight = None
        total = None if x is None else how.before(x)
        if ctx.needs_input_grad[0]:
            dx = how.gradient_after(base.dgrad(dy, weight))
        if total is not None:
            d_weight = base.wgrad(dy, total, weight, fused=how.fused)
        return dx, d_weight, _bias_gradient(ctx, dy, 2), None


class _NormLinear(torch.autograd.Function):
    """y = norm(x) Wᵀ + bias, and the norm's output; that is kept where W is trained."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        how: How,
    ) -> tuple[Tensor, Tensor]:
        normed, statistics = norms.normalize(x, has_mean=beta is not None)
        y = base.product(how.before(normed), weight)
        ctx.how, ctx.has_bias = how, bias is not None
        kept = normed if weight.requires_grad else None
        tensors: Any = (x, gamma, beta, weight, kept, *statistics)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    def backward(ctx: Kept, dy: Tensor, d_normed: Tensor | None):  # type: ignore[override]
        x, gamma, beta, weight, normed, *_ = ctx.saved_tensors
        how: How = ctx.how
        total = None if normed is None else how.before(normed)
        own = how.gradient_after(base.dgrad(dy, weight))
        d_weight = None
        if total is not None:
            d_weight = base.wgrad(dy, total, weight, fused=how.fused)
        del total
        if d_normed is not None:
            own = own + d_normed
        dx = torch.empty_like(x)
        d_gamma = torch.empty_like(gamma)
        d_beta = None if beta is None else torch.empty_like(beta)
        return dx, d_gamma, d_beta, d_weight, _bias_gradient(ctx, dy, 4), None


def _bias_gradient(ctx: Kept, dy: Tensor, index: int) -> Tensor | None:
    if not ctx.has_bias or not ctx.needs_input_grad[index]:
        return None
    return dy.new_empty(dy.shape[-1])


class SplitLinear(TransformerEngineBaseModule):
    """What linears have whose weights are split over tensor-parallel ranks by `parallel_mode`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Device = "cuda",
        **_unused: object,
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = out_features // self.tp_size
        if parallel_mode == "row":
            self.in_features = in_features // self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        self._add_parameters({"dtype": params_dtype, "device": device})

    def _add_parameters(self, where: dict[str, Any]) -> None:
        raise NotImplementedError


class Linear(SplitLinear):
    """A linear W [o, i]."""

    def __init__(
        self, in_features: int, out_features: int, *, save_original_input: bool = False, **how: Any
    ) -> None:
        self.save_original_input = save_original_input
        super().__init__(in_features, out_features, **how)

    def _add_parameters(self, where: dict[str, Any]) -> None:
        is_row = self.parallel_mode == "row"
        weight = self.add_parameter("weight", (self.out_features, self.in_features), **where)
        base.mark_split(weight, row=is_row)
        if not self.use_bias:
            self.bias = torch.empty(0, **where)
            return
        bias = self.add_parameter("bias", (self.out_features,), **where)
        if is_row:
            setattr(bias, "sequence_parallel", self.sequence_parallel)  # noqa: B010
        elif self.parallel_mode == "column":
            base.mark_split(bias)

    def _how(self) -> How:
        group = self.tp_group if self.tp_size > 1 else None
        fused = self.fuse_wgrad_accumulation
        return How(self.parallel_mode, group, self.sequence_parallel, fused)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, **_: object) -> Any:
        """Return y [.., o], with the bias beside it where that is to be returned."""
        bias: Any = self.bias if self.apply_bias else None
        y = _Linear.apply(inp, self.weight, bias, self._how())
        return (y, self.bias) if self.return_bias else y


class LayerNormLinear(Linear):
    """A linear with a layer norm before it, whose output it may return beside its own."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        **how: Any,
    ) -> None:
        self.normalization, self.eps = normalization, eps
        self._return_layernorm_output = return_layernorm_output
        super().__init__(in_features, out_features, **how)
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = False

    def _add_parameters(self, where: dict[str, Any]) -> None:
        names = ("layer_norm_weight", "layer_norm_bias")
        has_mean = self.normalization == "LayerNorm"
        if not has_mean:
            self.layer_norm_bias = None
        for name in names[: 1 + has_mean]:
            parameter = self.add_parameter(name, (self.in_features,), **where)
            setattr(parameter, "sequence_parallel", self.sequence_parallel)  # noqa: B010
        super()._add_parameters(where)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None, **_: object) -> Any:
        """Return y, then the bias and the norm's output where they are to be returned."""
        bias: Any = self.bias if self.apply_bias else None
        parameters = self.layer_norm_weight, self.layer_norm_bias, self.weight, bias
        y, normed = _NormLinear.apply(inp, *parameters, self._how())  # type: ignore[misc]
        if self.return_bias:
            more = (self.bias, normed) if self.return_layernorm_output else (self.bias,)
            return y, *more
        return (y, normed) if self.return_layernorm_output else y
