"""What Megatron's linears look like to an adapter: one description for every backend.

Nothing here wraps a base layer. `describe` says how a module's weight is split and how large it is;
`state` reads, at run time, in which state the token tensors around it are.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from torch.distributed import ProcessGroup

from megalora.adapters.collectives import group_size


class Split(Enum):
    """How a base weight W [out, in] is split over its tensor-parallel group."""

    COLUMN = "column"
    ROW = "row"
    DUPLICATED = "duplicated"


class State(Enum):
    """State of the wide tensor at an adapter's unsplit side: x of a column, y of a row linear."""

    TOKEN_SHARD = "token shard"
    REPLICATED = "replicated"
    PARTIAL = "partial sum"


class Style(Enum):
    """Calling convention of a base module."""

    LINEAR = "linear"
    LAYERNORM_LINEAR = "linear with a fused layer norm before it"
    GROUPED = "grouped linear"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Base:
    """A base linear W [out_features, in_features], sizes global, split over `group`.

    num_experts: local experts of a grouped linear, 0 for a dense one.
    """

    module: Any
    split: Split
    style: Style
    group: ProcessGroup | None
    in_features: int
    out_features: int
    num_experts: int = 0
    is_expert: bool = False

    @property
    def tp_size(self) -> int:
        """Number of ranks that share the weight."""
        return group_size(self.group)

    @property
    def tp_rank(self) -> int:
        """Number of this rank among them."""
        return 0 if self.group is None else self.group.rank()

    def weights(self) -> list[torch.Tensor]:
        """Return the local weights: one, or one for each local expert."""
        if self.num_experts == 0:
            weight = self.module.weight
            if weight is None:
                raise ValueError("the base linear has no weight of its own: embeddings are tied")
            return [weight]
        if getattr(self.module, "single_grouped_weight", False):
            return list(self.module.weight.unbind(0))
        return [getattr(self.module, f"weight{i}") for i in range(self.num_experts)]


# Without TransformerEngine, Megatron's TE classes are mocks that isinstance() rejects.
_TE = te.HAVE_TE
_TE_LAYERNORM: tuple[Any, ...] = (te.TELayerNormColumnParallelLinear,) if _TE else ()
_TE_COLUMN: tuple[Any, ...] = (te.TEColumnParallelLinear,) if _TE else ()
_TE_ROW: tuple[Any, ...] = (te.TERowParallelLinear,) if _TE else ()
_TE_LINEAR: tuple[Any, ...] = (te.TELinear,) if _TE else ()
_TE_GROUPED: tuple[Any, ...] = (te.TEGroupedLinear,) if _TE and te.TEGroupedLinear else ()
_TE_GROUPED_COLUMN: tuple[Any, ...] = (te.TEColumnParallelGroupedLinear,) if _TE_GROUPED else ()
_TE_ALL = _TE_LAYERNORM + _TE_COLUMN + _TE_ROW + _TE_LINEAR


def describe(module: Any) -> Base | None:
    """Describe a module as a base linear; None where it is something else."""
    if isinstance(module, _TE_GROUPED):
        return _describe_te_grouped(module)
    if isinstance(module, _TE_ALL):
        return _describe_te(module)
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return _describe_megatron(module)
    if isinstance(module, TopKRouter):
        out_features, in_features = module.weight.shape
        group = cast(Any, module.tp_group)
        return Base(module, Split.DUPLICATED, Style.ROUTER, group, in_features, out_features)
    return None


def describe_sequential(experts: SequentialMLP, name: str) -> Base:
    """Describe linear `name` of all local experts of a SequentialMLP as one grouped linear."""
    first = describe(getattr(experts.local_experts[0], name))
    assert first is not None
    return Base(
        experts,
        first.split,
        Style.GROUPED,
        first.group,
        first.in_features,
        first.out_features,
        num_experts=len(experts.local_experts),
        is_expert=True,
    )


def state(base: Base) -> State:
    """Return the state of the wide tensor at this call; flags change between calls."""
    module = base.module
    if base.is_expert or getattr(module, "explicit_expert_comm", False):
        return State.PARTIAL
    if base.style is Style.ROUTER:
        sharded = module.config.sequence_parallel and base.tp_size > 1
        return State.TOKEN_SHARD if sharded else State.REPLICATED
    if base.split is Split.DUPLICATED:
        sharded = module.config.sequence_parallel and base.tp_size > 1
        return State.TOKEN_SHARD if sharded else State.REPLICATED
    # Shared-expert overlap clears TE's parallel_mode: its communication happens outside.
    if isinstance(module, _TE_ALL) and module.parallel_mode is None:
        return State.PARTIAL
    if getattr(module, "disable_grad_reduce", False):
        return State.PARTIAL
    return State.TOKEN_SHARD if module.sequence_parallel else State.REPLICATED


def refusal(module: Any) -> str | None:
    """Say why adapters inside a module would be bypassed or misplaced; None where not."""
    kind = type(module).__name__
    if kind == "TEFusedMLP":
        return "TEFusedMLP runs its linears as one fused operation: leave out --use-te-op-fuser"
    if isinstance(module, TEGroupedMLP) and module.config.use_transformer_engine_op_fuser:
        return "TEGroupedMLP with the op fuser runs its linears as one operation: turn it off"
    if isinstance(module, TEGroupedMLP) and module.config.moe_mlp_glu_interleave_size is not None:
        return "TEGroupedMLP interleaves gate and up: leave out --moe-mlp-glu-interleave-size"
    if kind == "FusedSharedExpertMLP":
        return "FusedSharedExpertMLP runs its linears as one operation: turn grouped GEMM off"
    if kind == "AbsorbedMLASelfAttention":
        return (
            "AbsorbedMLASelfAttention multiplies by linear_kv_up_proj's weight without calling it: "
            "leave this attention out, as by --lora-targets mlp mamba unembed"
        )
    if kind.startswith("Inference"):
        return f"{kind} is for inference only: build the model with a training layer spec"
    return None


def _describe_megatron(module: Any) -> Base:
    column = isinstance(module, ColumnParallelLinear)
    if not column and not module.input_is_parallel:
        raise ValueError(
            "RowParallelLinear with input_is_parallel=False has no adapter: "
            "build it with input_is_parallel=True or leave it out of lora_targets"
        )
    return Base(
        module,
        Split.COLUMN if column else Split.ROW,
        Style.LINEAR,
        cast(Any, module.tp_group),
        module.input_size,
        module.output_size,
        is_expert=module.is_expert,
    )


def _describe_te(module: Any) -> Base:
    rows, columns = module.weight.shape
    group, size = module._tp_group, group_size(module._tp_group)
    # Experts without grouped GEMM, and duplicated linears, tell TE of no group.
    is_expert = not getattr(module.weight, "allreduce", True) or bool(
        getattr(module, "is_expert", False)
    )
    if isinstance(module, _TE_LAYERNORM):
        return Base(module, Split.COLUMN, Style.LAYERNORM_LINEAR, group, columns, rows * size)
    if isinstance(module, _TE_COLUMN):
        out = rows * size
        return Base(module, Split.COLUMN, Style.LINEAR, group, columns, out, is_expert=is_expert)
    if isinstance(module, _TE_ROW):
        return Base(
            module, Split.ROW, Style.LINEAR, group, columns * size, rows, is_expert=is_expert
        )
    return Base(module, Split.DUPLICATED, Style.LINEAR, group, columns, rows)


def _describe_te_grouped(module: Any) -> Base:
    weight = module.weight[0] if getattr(module, "single_grouped_weight", False) else module.weight0
    rows, columns = weight.shape
    group, size = module._tp_group, group_size(module._tp_group)
    column = isinstance(module, _TE_GROUPED_COLUMN)
    return Base(
        module,
        Split.COLUMN if column else Split.ROW,
        Style.GROUPED,
        group,
        columns if column else columns * size,
        rows * size if column else rows,
        num_experts=module.num_gemms,
        is_expert=True,
    )
