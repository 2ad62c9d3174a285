"""Autograd nodes without what functorch's transforms alone need of them."""

from typing import Any

import torch
from torch.autograd import Function


def apply(node: type[Function], *args: object) -> Any:
    """Return node.apply(*args).

    NOTE: torch's own looks into every argument for a wrapper of vmap or grad: 4 us of a node's 11.
    Where a transform or a compiler is at work, that is what happens here too.
    """
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return node.apply(*args)
    return super(Function, node).apply(*args)  # type: ignore[attr-defined]
