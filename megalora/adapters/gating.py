"""What decides whether a gated MLP with adapters may take the pass of ours between its linears."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from megalora.adapters.adapter import LoRAAdapter


def is_swiglu(config: TransformerConfig) -> bool:
    """Say whether gated MLPs of a configuration are silu(gate) up between their products."""
    return (
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
        and not config.activation_func_fp8_input_store
    )


class Choice:
    """Whether the pass is the faster way for tokens of a dtype on a device: asked once of the ops.

    one, two: the adapters of both linears, whole on this rank.
    """

    def __init__(self, one: LoRAAdapter, two: LoRAAdapter) -> None:
        self._adapters = one, two
        self._known: dict[tuple[torch.dtype, torch.device], bool] = {}

    def __call__(self, x: Tensor) -> bool:
        """Say whether it is for x."""
        key = (x.dtype, x.device)
        if key not in self._known:
            one, two = self._adapters
            like = x.new_empty(1, two.base.in_features)  # the second weight but for its rows
            ranks = one.spec.rank, two.spec.rank
            self._known[key] = one.ops.gated_mlp_is_fused(like, *ranks)
        return self._known[key]


def takes_weights(weights: Tensor | None, x: Tensor) -> bool:
    """Say whether the pass can multiply the tokens x [..., i] by these weights."""
    if weights is None:
        return True
    are_fp32 = weights.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    alike = weights.dtype == x.dtype or are_fp32
    return alike and weights.shape == x.shape[:-1] and weights.is_contiguous()


def all_learn(*tensors: Tensor) -> bool:
    """Say whether each of these has a gradient, or none is asked for: a node has all or none."""
    return not torch.is_grad_enabled() or all(tensor.requires_grad for tensor in tensors)


def has_hooks(modules: list[torch.nn.Module]) -> bool:
    """Say whether a module must be called: Megatron gathers parameters in hooks, users look."""
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
