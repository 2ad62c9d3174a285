"""What TransformerEngine's layers share: sizes of a shard, gathers of tokens, sums of gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from megalora.plan.engine.kernels import ops

Device = torch.device | str | int


class Kept(FunctionCtx):
    """What a backward finds of its forward: tensors, and what else it needs to know."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    how: Any
    has_bias: bool
    fused: bool
    pairs: int
    context: Any
    num_rows: int
    shape: Any
    shapes: Any
    dtype: torch.dtype


class TransformerEngineBaseModule(torch.nn.Module):
    """Parent of layers with weights. They compute in bf16: a plan has no FP8."""

    fp8 = fp8_calibration = False
    tp_group: ProcessGroup | None = None

    def set_tensor_parallel_group(self, tp_group: ProcessGroup | None) -> None:
        """Set the group that the weight is split over."""
        self.tp_group = tp_group

    def get_extra_state(self) -> Tensor:
        """Return what TransformerEngine stores of a layer without FP8: an empty tensor."""
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: object) -> None:
        """Read nothing: there is no FP8."""

    def backward_dw(self) -> None:
        """Compute weight gradients that were put off: a plan computes them in backward."""

    def add_parameter(self, name: str, shape: tuple[int, ...], **how: Any) -> torch.nn.Parameter:
        """Register a parameter without numbers; how: device and dtype."""
        parameter = torch.nn.Parameter(torch.empty(shape, **how))
        self.register_parameter(name, parameter)
        return parameter


def size_of(group: ProcessGroup | None) -> int:
    """Return how many ranks a group has, one where there is none."""
    return 1 if group is None else group.size()


def mark_split(tensor: Tensor, *, row: bool = False) -> None:
    """Tell Megatron along which dimension a weight is split."""
    for name, value in (
        ("tensor_model_parallel", True),
        ("partition_dim", int(row)),
        ("partition_stride", 1),
    ):
        setattr(tensor, name, value)


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather the first dimension."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks and keep a shard of the first dimension."""
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weightᵀ; x: [..., i], weight: [o, i]."""
    return torch.mm(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], weight.shape[0])


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dy weight; dy: [..., o], weight: [o, i]."""
    return torch.mm(dy.flatten(0, -2), weight).view(*dy.shape[:-1], weight.shape[1])


def wgrad(dy: Tensor, x: Tensor, weight: torch.nn.Parameter, *, fused: bool) -> Tensor:
    """Return dyᵀ x, or a stand-in where the kernel adds it to main_grad itself."""
    main_grad = getattr(weight, "main_grad", None) if fused else None
    if main_grad is None:
        return torch.mm(dy.flatten(0, -2).t(), x.flatten(0, -2))
    ops.wgrad_(main_grad, dy, x)
    return added(weight)


_stand_ins: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def stand_in(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor that stands for all gradients of a shape: the process keeps it."""
    key = shape, dtype
    if key not in _stand_ins:
        _stand_ins[key] = torch.empty(shape, dtype=dtype, device="cuda")
    return _stand_ins[key].detach()


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """Return `stand_in`, as Megatron asks for it."""
    return stand_in(torch.Size(shape), dtype)


def added(weight: torch.nn.Parameter) -> Tensor:
    """Tell DDP that main_grad has a gradient; return what autograd gets in its place."""
    if hasattr(weight, "grad_added_to_main_grad"):
        setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010
    return stand_in(weight.shape, weight.dtype)
