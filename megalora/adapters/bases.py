"""What Megatron's linears look like to an adapter: one description for every backend.

Nothing here wraps a base layer. `describe` says how a module's weight is split and how large it is,
by a table that has an entry for each kind of base (how it is called is in `adapters.styles`);
`state` reads, at run time, in which state the token tensors around it are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    SEQUENTIAL = "linear of experts that are called one by one"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Base:
    """A base linear W [out_features, in_features], sizes global, split over `group`.

    num_experts: local experts of their linear, 0 for a dense one. linears: those of experts that
    are called one by one, `module` being what calls them.
    """

    module: Any
    split: Split
    style: Style
    group: ProcessGroup | None
    in_features: int
    out_features: int
    num_experts: int = 0
    is_expert: bool = False
    linears: tuple[torch.nn.Module, ...] = ()

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
        if self.linears:
            return [linear.get_parameter("weight") for linear in self.linears]
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
LAYERNORM_LINEARS: tuple[Any, ...] = (te.TELayerNormColumnParallelLinear,) if _TE else ()
_TE_COLUMN: tuple[Any, ...] = (te.TEColumnParallelLinear,) if _TE else ()
_TE_ROW: tuple[Any, ...] = (te.TERowParallelLinear,) if _TE else ()
_TE_LINEAR: tuple[Any, ...] = (te.TELinear,) if _TE else ()
_TE_GROUPED: tuple[Any, ...] = (te.TEGroupedLinear,) if _TE and te.TEGroupedLinear else ()
_TE_GROUPED_COLUMN: tuple[Any, ...] = (te.TEColumnParallelGroupedLinear,) if _TE_GROUPED else ()
_TE_GROUPED_ROW: tuple[Any, ...] = (te.TERowParallelGroupedLinear,) if _TE_GROUPED else ()
# Those that Megatron calls with x and that give (y, bias).
PLAIN_LINEARS = (ColumnParallelLinear, RowParallelLinear, *_TE_COLUMN, *_TE_ROW, *_TE_LINEAR)
GROUPED_LINEARS = (*_TE_GROUPED_COLUMN, *_TE_GROUPED_ROW)
_TE_ALL = LAYERNORM_LINEARS + _TE_COLUMN + _TE_ROW + _TE_LINEAR


def base_linears(root: torch.nn.Module) -> Iterator[tuple[str, Base]]:
    """Yield all base linears of a module with their names; experts' are one for all of them."""
    inner: set[torch.nn.Module] = set()
    for name, module in root.named_modules():
        if module in inner:
            continue
        for leaf, base in describe(module).items():
            yield f"{name}.{leaf}".strip("."), base
            inner |= set(module.modules())


def describe(module: torch.nn.Module) -> dict[str, Base]:
    """Describe the base linears that a module is, or whose calls it makes, by name inside it."""
    for kinds, describe_one in _DESCRIPTIONS:
        if isinstance(module, kinds):
            return describe_one(module)
    return {}


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


def refusal(module: torch.nn.Module) -> str | None:
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
    if kind.startswith("Inference"):
        return f"{kind} is for inference only: build the model with a training layer spec"
    return None


def left_out(parent: torch.nn.Module, leaf: str) -> str | None:
    """Say why the linear `leaf` of a module cannot train an adapter; None where it can."""
    kind = type(parent).__name__
    if kind == "AbsorbedMLASelfAttention" and leaf == "linear_kv_up_proj":
        return "AbsorbedMLASelfAttention multiplies by its weight without calling it"
    if kind == "DSAIndexer":
        return "DSAIndexer picks tokens, through which the loss has no gradient"
    return None


def _by_itself(describe_one: Callable[[Any], Base]) -> Callable[[Any], dict[str, Base]]:
    return lambda module: {"": describe_one(module)}


def _describe_sequential(experts: SequentialMLP) -> dict[str, Base]:
    """Describe each linear of all local experts as one grouped linear."""
    return {name: _of_all_experts(experts, name) for name in ("linear_fc1", "linear_fc2")}


def _of_all_experts(experts: SequentialMLP, name: str) -> Base:
    linears = tuple(getattr(expert, name) for expert in experts.local_experts)
    return replace(
        describe(linears[0])[""],
        module=experts,
        style=Style.SEQUENTIAL,
        num_experts=len(linears),
        is_expert=True,
        linears=linears,
    )


def _describe_router(module: TopKRouter) -> Base:
    out_features, in_features = module.weight.shape
    group = cast(ProcessGroup, module.tp_group)
    return Base(module, Split.DUPLICATED, Style.ROUTER, group, in_features, out_features)


def _describe_megatron(module: ColumnParallelLinear | RowParallelLinear) -> Base:
    if isinstance(module, RowParallelLinear) and not module.input_is_parallel:
        raise ValueError(
            "RowParallelLinear with input_is_parallel=False has no adapter: "
            "build it with input_is_parallel=True or leave it out of lora_targets"
        )
    return Base(
        module,
        Split.ROW if isinstance(module, RowParallelLinear) else Split.COLUMN,
        Style.LINEAR,
        cast(ProcessGroup, module.tp_group),
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
    if isinstance(module, LAYERNORM_LINEARS):
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


# The first that fits: TransformerEngine's classes are each other's parents.
_DESCRIPTIONS: tuple[tuple[tuple[type, ...], Callable[[Any], dict[str, Base]]], ...] = (
    (_TE_GROUPED, _by_itself(_describe_te_grouped)),
    (_TE_ALL, _by_itself(_describe_te)),
    ((ColumnParallelLinear, RowParallelLinear), _by_itself(_describe_megatron)),
    ((SequentialMLP,), _describe_sequential),
    ((TopKRouter,), _by_itself(_describe_router)),
)
