"""The adapters of dense linears, and of the router's gate."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split
from megalora.adapters.one_gemm import (
    biases,
    is_norm_of,
    is_one_gemm,
    norm_of,
    open_behind_norm,
    open_weight,
)
from megalora.adapters.opened import Opened, adapt_opened
from megalora.adapters.sandwich import adapt, add_update

LinearForward = Callable[..., tuple[Tensor, Tensor | None]]


class LinearAdapter(LoRAAdapter):
    """Adapt a dense linear that gives (y, bias): Megatron's own or TransformerEngine's."""

    def forward(
        self, base_forward: LinearForward, x: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """Call the base with its adapter around or inside it; returns what the base returns."""
        if not self.enabled:
            return base_forward(x, *args, **kwargs)
        given: Any = args[0] if args else kwargs.get("weight")
        if (opened := self.opened(x, given)) is not None:
            return self._open(x, opened)
        gather = kwargs.pop("runtime_gather_output", None)
        if gather is None:
            gather = getattr(self.base.module, "gather_output", False)
        if self.base.split is Split.COLUMN and hasattr(self.base.module, "gather_output"):
            # B's shard meets the columns of this rank: gather the sum, not the base's part.
            kwargs["runtime_gather_output"] = False

        def run_base(inner: Tensor) -> tuple[Tensor, Tensor | None]:
            return base_forward(inner, *args, **kwargs)

        a, b = self.pair()
        y, bias = adapt(run_base, x, a, b, self._call(x, a, b))
        if gather:
            y = gather_from_tensor_model_parallel_region(y, group=self.base.group)
        return y, bias

    def bind(self) -> None:
        """Wrap the base's forward; where nothing is split over ranks, calls may open the base."""
        self.opens = self._is_whole() and is_one_gemm(self.base.module)
        super().bind()

    def opened(self, x: Tensor, weight: Tensor | None = None) -> Opened | None:
        """Return what a call with x opens, None where it leaves the base closed.

        weight: what the call is given in place of the base's own.
        """
        if not (self.opens and self.enabled) or self._drops():
            return None
        weight = open_weight(self.base.module, x, weight)
        return None if weight is None else self._opened(weight)

    def _opened(self, weight: Tensor) -> Opened:
        a, b = self.pair()
        return Opened(weight, a, b, self._local_call(a, b))

    def _open(self, x: Tensor, opened: Opened) -> tuple[Tensor, Tensor | None]:
        added, left = biases(self.base.module)
        return adapt_opened(x, *opened, added), left


class LayerNormLinearAdapter(LinearAdapter):
    """Adapt a linear of TransformerEngine with a layer norm before it: inside, or after it ran."""

    _kept_norm: torch.nn.Module | None = None

    def forward(self, base_forward: LinearForward, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Call the base with its adapter; returns (y, bias), as the base does without one."""
        if self.enabled and self.opens and not self._drops():
            weight = open_behind_norm(self.base.module, x)
            if weight is not None:
                return self._open(self._norm(x), self._opened(weight))
        result: Any = base_forward(x)
        # NOTE: the local layer norm output only. The gathered one loses its gradient inside TE.
        if self.base.module.te_return_bias:
            y, bias, normed = result
        else:
            (y, normed), bias = result
        if not self.enabled:
            return y, bias
        a, b = self.pair()
        return add_update(normed, y, a, b, self._call(normed, a, b)), bias

    def bind(self) -> None:
        """Wrap the base's forward, and ask it for its layer norm's output."""
        super().bind()
        self.base.module.return_layernorm_output = True
        self.base.module.return_layernorm_output_gathered = False

    def _norm(self, x: Tensor) -> Tensor:
        """Return the layer norm's output, made by the kernel and the parameters of the base."""
        base, norm = self.base.module, self._kept_norm
        # Anew where the base got other parameters, as it does when a model leaves the meta device.
        if norm is None or not is_norm_of(norm, base):
            norm = norm_of(base)
            # Not registered as a submodule: its parameters are the base's.
            self.__dict__["_kept_norm"] = norm
        return norm(x)


class RouterAdapter(LoRAAdapter):
    """Adapt the gate of a router, which may compute in fp32 or fp64."""

    def forward(self, base_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the logits with the update, made in the adapter's precision."""
        logits = base_forward(x)
        if not self.enabled:
            return logits
        update = x.new_zeros(*x.shape[:-1], self.base.out_features)
        a, b = self.pair()
        return logits + add_update(x, update, a, b, self._call(x, a, b)).to(logits.dtype)

    def bind(self) -> None:
        """Wrap the router's gate alone."""
        router = self.base.module
        router.gating = functools.partial(self, router.gating)
