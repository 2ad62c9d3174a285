"""The adapters of experts: grouped linears in one call, and experts that are called one by one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Split, state
from megalora.adapters.collectives import GatherFactor
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.adapters.sandwich import Call, adapt


class GroupedAdapter(LoRAAdapter):
    """Adapt a grouped linear over tokens sorted by expert, all local experts in one call."""

    def forward(self, base_forward: Callable[..., Any], x: Tensor, m_splits: Any) -> Any:
        """Call the base with its adapter around it.

        x: [tokens, i] sorted by local expert. m_splits: tokens of each expert, as a list or an
        int64 tensor on either device.
        """
        if not self.enabled:
            return base_forward(x, m_splits)
        # From pageable memory, too, a copy that blocks nothing is staged before it returns.
        splits = torch.as_tensor(m_splits, dtype=torch.int64).to(x.device, non_blocking=True)
        offsets = splits.cumsum(0)
        call = self._call(x, offsets)
        return adapt(
            lambda inner: base_forward(inner, m_splits), x, self.lora_A, self.b_rows(), call
        )


class SequentialAdapter(LoRAAdapter):
    """Adapt one linear of all experts of a SequentialMLP, which calls its experts one by one.

    Factors are gathered once for all experts; each expert then uses its own slice.
    """

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Return (A, B) of every local expert, gathered over the groups that shard them."""
        a, b = self.lora_A, self.b_rows()
        if self.base.split is Split.COLUMN or self.spec.shared_a:
            a = GatherFactor.apply(a, -1, self.a_group)
        if self.base.split is Split.ROW or self.spec.shared_b:
            b = GatherFactor.apply(b, -2, self.b_group)
        num = self.base.num_experts
        a_list = a.unbind(0) if self.a_experts else [a] * num  # type: ignore[union-attr]
        b_list = b.unbind(0) if self.b_experts else [b] * num  # type: ignore[union-attr]
        return list(zip(a_list, b_list, strict=True))

    def call_expert(
        self, factors: tuple[Tensor, Tensor], base_forward: Callable[..., Any], x: Tensor
    ) -> Any:
        """Call one expert's linear with its adapter around it."""
        seed = self._seed(state(self.base), x.device)
        call = Call(
            ops=self.ops,
            route=LOCAL_ROUTE,
            scale=self.spec.scale,
            segments=self.segments(),
            dropout=self.config.dropout if seed is not None else 0.0,
            seed=seed,
        )
        return adapt(base_forward, x, *factors, call)


class SequentialBinding:
    """Give every expert of a SequentialMLP its slice of the adapters for the time of a call."""

    def __init__(self, adapters: Mapping[str, SequentialAdapter]) -> None:
        self.adapters = dict(adapters)
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def call(self, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gather the factors, run the experts, let the factors go."""
        enabled = {name: a for name, a in self.adapters.items() if a.enabled}
        self.factors = {name: adapter() for name, adapter in enabled.items()}
        try:
            return base_forward(*args, **kwargs)
        finally:
            self.factors = {}

    def call_linear(
        self, name: str, expert: int, base_forward: Callable[..., Any], x: Tensor
    ) -> Any:
        """Run linear `name` of one expert."""
        if name not in self.factors:
            return base_forward(x)
        return self.adapters[name].call_expert(self.factors[name][expert], base_forward, x)


def bind_sequential(adapters: Mapping[str, SequentialAdapter]) -> None:
    """Wrap a SequentialMLP's forward and those of its experts' linears."""
    binding = SequentialBinding(adapters)
    experts = next(iter(adapters.values())).base.module
    experts.forward = functools.partial(binding.call, experts.forward)
    for index, expert in enumerate(experts.local_experts):
        for name in adapters:
            linear = getattr(expert, name)
            linear.forward = functools.partial(binding.call_linear, name, index, linear.forward)
