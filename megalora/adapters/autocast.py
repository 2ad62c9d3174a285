"""torch.autocast around a closed base: the adapter takes what torch's own linears would take.

Not in the ops: backward, which autocast is not for, takes what was cast before them.
"""

import torch
from torch import Tensor


def is_autocast(x: Tensor) -> bool:
    """Say whether torch's own linears would cast x before they multiply.

    NOTE: torch knows of no autocast on meta, where a plan's tensors are.
    """
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that they would cast it to: they leave float64 as it is."""
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Return tensors in a dtype, through which their gradients go back."""
    return [tensor.to(dtype) for tensor in tensors]
