"""What a plan takes for given where a run would look at numbers: experts are used evenly."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol
from unittest import mock

import torch
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.optimizer import optimizer as optimizers
from megatron.core.transformer.moe import router, token_dispatcher
from torch import Tensor
from torch.distributed import ProcessGroup


class Routed(Protocol):
    """The router of a layer, as far as a plan reads it."""

    topk: int


def even_use(routing: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Let each token choose its experts in turn, so that all have as many tokens, within one."""

    def route(
        self: Routed, logits: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        probs, chosen = routing(self, logits, *args, **kwargs)
        num_tokens, num_experts = chosen.shape
        # On the CPU: split sizes are made of it.
        even = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
        uses = torch.arange(num_tokens * self.topk)
        even[uses // self.topk, uses % num_experts] = True
        return probs, even

    return route


def alike(gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let every rank have used experts as this one: what is gathered of it has numbers."""

    def gathered(x: Tensor, *args: object, group: ProcessGroup, **kwargs: object) -> Tensor:
        if x.device.type != "cpu":
            return gather(x, *args, group=group, **kwargs)
        gather(torch.empty_like(x, device="cuda"), *args, group=group, **kwargs)
        return x.repeat(group.size(), *[1] * (x.dim() - 1))

    return gathered


def some_norm(applier: Callable[..., Any]) -> Callable[..., Any]:
    """Let gradients have a norm."""

    def apply(op: object, *args: object) -> object:
        if op is clip_grads.l2_norm_impl:
            return torch.ones(1, device="cuda"), None
        return applier(op, *args)

    return apply


def as_on_gpu(is_autocast_enabled: Callable[[str], bool]) -> Callable[[str], bool]:
    """Let torch answer for the meta device, which it does not know, as for a GPU."""

    def enabled(device_type: str = "cuda") -> bool:
        return is_autocast_enabled("cuda" if device_type == "meta" else device_type)

    return enabled


def own_norm_groups(has_group: Callable[..., bool]) -> Callable[..., bool]:
    """Let gradients that are clipped apart be there where this rank has some; it can ask no one."""

    def has(self: MegatronOptimizer, grad_norm_group: str) -> bool:
        group_of = optimizers._get_param_grad_norm_group
        return any(group_of(param) == grad_norm_group for param in self.get_parameters())

    return has


def assumptions() -> AbstractContextManager[object]:
    """Return the context in which a step runs that has shapes and no numbers."""
    stack = ExitStack()
    for owner, name, wrap in (
        (router.TopKRouter, "routing", even_use),
        (token_dispatcher, "gather_from_sequence_parallel_region", alike),
        (torch, "is_autocast_enabled", as_on_gpu),
        (clip_grads, "multi_tensor_applier", some_norm),
        (MegatronOptimizer, "has_grad_norm_group", own_norm_groups),
    ):
        stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
    return stack
