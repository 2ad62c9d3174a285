"""The adapters of experts: grouped linears in one call, and experts that are called one by one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split, state
from megalora.adapters.call import Call
from megalora.adapters.collectives import GatherFactor
from megalora.adapters.one_gemm import (
    biases,
    is_one_gemm,
    is_one_grouped_gemm,
    open_weight,
    open_weights,
)
from megalora.adapters.opened import Opened, adapt_opened, adapt_opened_experts
from megalora.adapters.sandwich import adapt

ExpertForward = Callable[..., tuple[Tensor, Tensor | None]]


class GroupedAdapter(LoRAAdapter):
    """Adapt a grouped linear over tokens sorted by expert, all local experts in one call."""

    _weights: list[Tensor] | None = None

    def forward(
        self, base_forward: ExpertForward, x: Tensor, m_splits: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Call the base with its adapter around it.

        x: [tokens, i] sorted by local expert. m_splits: tokens of each expert, as a list or an
        int64 tensor on either device.
        """
        if not self.enabled:
            return base_forward(x, m_splits)
        a, b = self.pair()
        ends = on_device(m_splits, x.device).cumsum(0)
        weights = self._weights_to_open(x, a)
        if weights:
            call = self._local_call(a, b)
            return adapt_opened_experts(x, weights, a, b, ends, call), None
        call = self._call(x, a, b, ends)
        return adapt(lambda inner: base_forward(inner, m_splits), x, a, b, call)

    def bind(self) -> None:
        """Wrap the base's forward; where nothing is split over ranks, calls may open the base."""
        is_per_expert = self.a_experts > 0 and self.b_experts > 0
        self.opens = self._is_whole() and is_per_expert and is_one_grouped_gemm(self.base.module)
        super().bind()

    def closed(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Call] | None:
        """Return A, B and the call around a base that stays closed, where nothing travels or drops.

        None where the call opens its base, or its base computes something else than x Wᵀ. ends:
        of each expert's tokens.
        """
        if not self.enabled or not self.opens or self._drops():
            return None
        a, b = self.pair()
        opens = bool(self._weights_to_open(x, a))
        if opens or not self._weights or not open_weights(self._weights, x):
            return None
        return a, b, self._call(x, a, b, ends)

    def _weights_to_open(self, x: Tensor, a: Tensor) -> list[Tensor]:
        """Return the experts' weights where this call of theirs is one launch with the adapters."""
        if not self.opens or self._drops():
            return []
        # The module's names are looked up once: there may be hundreds.
        if not self._weights or self._weights[0] is not self.base.module.weight0:
            self._weights = self.base.weights()
        weights = self._weights
        if not open_weights(weights, x):
            return []
        is_fused = self.ops.experts_linear_is_fused(weights[0], len(weights), a.shape[1])
        return weights if is_fused else []


def on_device(m_splits: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return the experts' numbers of tokens on the device, without a wait of the host.

    NOTE: a GPU that reads pageable memory itself may do so after the copy's call has returned, and
    after the list's memory is another's. torch keeps pinned memory until the copy is done.
    """
    splits = torch.as_tensor(m_splits, dtype=torch.int64)
    if splits.device != device and device.type == "cuda":
        splits = splits.pin_memory()
    return splits.to(device, non_blocking=True)


class SequentialAdapter(LoRAAdapter):
    """Adapt one linear of all experts of a SequentialMLP, which calls its experts one by one.

    Factors are gathered once for all experts; each expert then uses its own slice.
    """

    pairs: Sequence[tuple[Tensor, Tensor]] = ()

    def bind(self) -> None:
        """Wrap the forward of all experts together, and that of the linear of each."""
        self.opens = self.base.tp_size == 1 and all(map(is_one_gemm, cast(Any, self.base.linears)))
        experts = self.base.module
        experts.forward = functools.partial(self._call_experts, experts.forward)
        for index, linear in enumerate(self.base.linears):
            linear.forward = functools.partial(self._call_expert, index, linear.forward)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Return (A, B) of every local expert, gathered over the groups that shard them."""
        a, b = self.pair()
        if self.base.split is Split.COLUMN or self.spec.shared_a:
            a: Any = GatherFactor.apply(a, -1, self.a_group)
        if self.base.split is Split.ROW or self.spec.shared_b:
            b: Any = GatherFactor.apply(b, -2, self.b_group)
        return self.by_expert(a, b)

    def _call_experts(
        self, base_forward: Callable[..., Any], *args: object, **kwargs: object
    ) -> Any:
        """Gather the factors, run the experts, let the factors go."""
        self.pairs = self() if self.enabled else ()
        try:
            return base_forward(*args, **kwargs)
        finally:
            self.pairs = ()

    def opened(self, index: int, x: Tensor) -> Opened | None:
        """Return what a call of an expert's linear opens, None where it leaves the base closed."""
        if not (self.opens and self.pairs) or self._drops():
            return None
        weight = open_weight(cast(Any, self.base.linears[index]), x)
        a, b = self.pairs[index]
        return None if weight is None else Opened(weight, a, b, self._local_call(a, b))

    def _call_expert(
        self, index: int, base_forward: ExpertForward, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Call the linear of one expert with its adapter around or inside it."""
        if not self.pairs:
            return base_forward(x)
        if (opened := self.opened(index, x)) is not None:
            added, left = biases(cast(Any, self.base.linears[index]))
            return adapt_opened(x, *opened, added), left
        a, b = self.pairs[index]
        seed = self._seed(state(self.base), x.device)
        return adapt(base_forward, x, a, b, self._local_call(a, b, seed))
