"""The adapter modules: parameters, their shards, and how each kind of base is called.

An adapter is a sibling of its base (`linear_qkv` and `linear_qkv_lora`), so base keys never change.
It wraps the base's `forward` on the instance and is itself called as a module, so that Megatron's
parameter gathering, which hooks module calls, sees it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora import ops
from megalora.adapters.bases import Base, Split, State, Style, state
from megalora.adapters.collectives import group_size, start_gather
from megalora.adapters.routes import ROUTES, Route, ShardUse
from megalora.adapters.rows import sharded_parts
from megalora.adapters.sandwich import Call, adapt, add_update
from megalora.config import LoRAConfig
from megalora.targets import AdapterSpec, local_segments


class LoRAAdapter(torch.nn.Module):
    """Hold the shards of one base linear's adapter; subclasses call the base.

    lora_A: [P r, i/t] where A's input is split over the tensor-parallel group, always.
    lora_B: [o/t, r]; [2, f/t, r] where the base is a gated linear_fc1, of which a rank owns gate_k
    and up_k; the rows of Mamba's in_proj are those that `megalora.adapters.rows` describes. Grouped
    adapters have the local experts as a first dimension, but for a factor that is shared over all
    experts (`shared_outer`), which is split over the dense group.
    start: the first values of both on the CPU, where the base gave them away (`adapters.pissa`).
    """

    base: Base
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter

    def __init__(
        self,
        base: Base,
        spec: AdapterSpec,
        config: LoRAConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        dense_group: ProcessGroup | None,
        expert_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        # Not registered as a submodule: the base belongs to its parent.
        self.__dict__["base"] = base
        self.spec, self.config, self.enabled = spec, config, True
        self.ops = ops.backend(config.ops)
        self.start: tuple[Tensor, Tensor] | None = None
        self.a_group = dense_group if spec.shared_a else base.group
        self.b_group = dense_group if spec.shared_b else base.group
        self.expert_group = expert_group
        self.lora_A = self._parameter(
            self.a_shape(), self.a_group, -1, spec.shared_a, dtype, device
        )
        self.lora_B = self._parameter(
            self.b_shape(), self.b_group, -2, spec.shared_b, dtype, device
        )

    @property
    def a_experts(self) -> int:
        """Local experts along lora_A, 0 where it has no such dimension."""
        return 0 if self.spec.shared_a else self.base.num_experts

    @property
    def b_experts(self) -> int:
        """Local experts along lora_B, 0 where it has no such dimension."""
        return 0 if self.spec.shared_b else self.base.num_experts

    def a_shape(self) -> tuple[int, ...]:
        """Shape of lora_A, unsharded over tensor-parallel ranks."""
        lead = (self.a_experts,) if self.a_experts else ()
        return (*lead, self.spec.num_projections * self.spec.rank, self.base.in_features)

    def b_shape(self) -> tuple[int, ...]:
        """Shape of lora_B, unsharded over tensor-parallel ranks."""
        lead = (self.b_experts,) if self.b_experts else ()
        rows = (2, self.base.out_features // 2) if self.spec.gated else (self.base.out_features,)
        return (*lead, *rows, self.spec.rank)

    def b_rows(self) -> Tensor:
        """Return the shard of lora_B as [(E,) o/t, r]."""
        return self.lora_B.flatten(-3, -2) if self.spec.gated else self.lora_B

    def extra_repr(self) -> str:
        """Describe the adapter in print(model)."""
        return (
            f"rank={self.spec.rank}, scale={self.spec.scale:g}, "
            f"lora_A={tuple(self.lora_A.shape)}, lora_B={tuple(self.lora_B.shape)}"
        )

    def sharded_tensors(self, prefix: str) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """Return both factors as sharded tensors with their global shapes and offsets."""
        a, b = prefix + "lora_A", prefix + "lora_B"
        if parts := self.spec.parts:
            replica = (0, 0, self._replica(self.lora_B))
            sharded_b = sharded_parts(b, self.lora_B, parts, self.b_group, replica)
        else:
            sharded_b = self._sharded(b, self.lora_B, -2, self.b_group)
        return {a: self._sharded(a, self.lora_A, -1, self.a_group), b: sharded_b}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Give nothing to a traversal of the base: `checkpoint.state` collects the adapters."""
        return {}

    def _parameter(
        self,
        shape: tuple[int, ...],
        group: ProcessGroup | None,
        dim: int,
        shared: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.nn.Parameter:
        size, factor = group_size(group), "lora_A" if dim == -1 else "lora_B"
        if shape[dim] % size:
            raise ValueError(
                f"{factor} of {self.spec.name} has {shape[dim]} features to shard, which is not "
                f"divisible by its tensor-parallel size {size}: leave it out of lora_targets"
            )
        local = list(shape)
        local[dim] //= size
        param = torch.nn.Parameter(torch.zeros(local, dtype=dtype, device=device))
        # Nothing is replicated over tensor-parallel ranks: the gradient norm counts every shard.
        param.tensor_model_parallel = True  # type: ignore[attr-defined]
        param.partition_dim = len(local) + dim  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]
        # Experts are reduced over expert data parallel ranks, even where these are all of them
        # (EP 1): the optimizer's state then has the same parts on every topology.
        param.allreduce = shared or not self.base.is_expert  # type: ignore[attr-defined]
        param.lora_factor = factor  # type: ignore[attr-defined]
        return param

    def _sharded(
        self, key: str, param: torch.nn.Parameter, dim: int, group: ProcessGroup | None
    ) -> ShardedTensor:
        offsets = []
        has_experts = self.a_experts if dim == -1 else self.b_experts
        if has_experts and group_size(self.expert_group) > 1:
            assert self.expert_group is not None
            offsets.append((0, self.expert_group.rank(), self.expert_group.size()))
        if group_size(group) > 1:
            assert group is not None
            offsets.append((param.dim() + dim, group.rank(), group.size()))
        return ShardedTensor.from_rank_offsets(
            key,
            param,
            *offsets,
            replica_id=(0, 0, self._replica(param)),
            # Megatron pads the vocabulary to a multiple of the tensor-parallel size.
            allow_shape_mismatch=dim == -2 and self.spec.is_unembedding,
        )

    def _replica(self, param: torch.nn.Parameter) -> int:
        """Return the number of this rank among those that hold the same shard."""
        if param.allreduce:  # type: ignore[attr-defined]
            return parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_rank()

    def _route(self, tensor_state: State) -> Route:
        route = ROUTES[self.base.split, tensor_state]
        # A factor shared over experts is split over the dense group, over which every rank holds
        # a part of its gradient, so its gradient is summed wherever it is used.
        a = ShardUse.SUMMED if self.spec.shared_a else route.a
        b = ShardUse.SUMMED if self.spec.shared_b else route.b
        return Route(a, b, route.forward, route.backward)

    def _seed(self, tensor_state: State, device: torch.device) -> Tensor | None:
        """Draw the dropout seed: different where x is a shard, equal where it is replicated.

        NOTE: from the current generator, which recomputation restores. Megatron's tracker must not
        be forked here: under sequence parallelism a block runs inside a fork (and ranks differ
        already), a recomputed block does not, and a nested fork would draw other numbers.
        """
        if self.config.dropout == 0.0 or not self.training:
            return None
        seed = torch.randint(2**62, (1,), device=device)
        distinct = self.base.split is Split.ROW or tensor_state is State.TOKEN_SHARD
        return seed + self.base.tp_rank if distinct else seed

    def _call(self, x: Tensor, offsets: Tensor | None = None) -> Call:
        tensor_state = state(self.base)
        seed = self._seed(tensor_state, x.device)
        return Call(
            ops=self.ops,
            route=self._route(tensor_state),
            scale=self.spec.scale,
            segments=self.segments(),
            group=self.base.group,
            a_group=self.a_group,
            b_group=self.b_group,
            a_offsets=offsets if self.a_experts else None,
            b_offsets=offsets if self.b_experts else None,
            dropout=self.config.dropout if seed is not None else 0.0,
            seed=seed,
            a_param=self._fused(self.lora_A),
            b_param=self._fused(self.lora_B),
        )

    def _fused(self, param: torch.nn.Parameter) -> torch.nn.Parameter | None:
        """Return the parameter where Megatron asks that backward adds to its main_grad."""
        asked = getattr(self.base.module.config, "gradient_accumulation_fusion", False)
        # NOTE: Megatron FSDP wants its buffer overwritten: what is in it is stale.
        added_to = getattr(param, "main_grad", None) is not None
        is_fsdp = hasattr(param, "__fsdp_param__") or getattr(param, "overwrite_main_grad", False)
        return param if asked and added_to and not is_fsdp else None

    def segments(self) -> list[int]:
        """Return the segments of the output columns that this rank's B covers when it is used."""
        # Only a column linear's B is used as the shard it is.
        size = self.base.tp_size if self.base.split is Split.COLUMN else 1
        return local_segments(
            self.spec.segments,
            self.base.out_features,
            gated=self.spec.gated,
            tp_rank=self.base.tp_rank if size > 1 else 0,
            tp_size=size,
        )

    def full_factors(self) -> tuple[Tensor, Tensor]:
        """Return A [(E,) P r, i/split] and B [(E,) o/split, r] as this rank's weight needs them."""
        a, b = self.lora_A.detach(), self.b_rows().detach()
        if self.base.split is not Split.ROW or self.spec.shared_a:
            a = start_gather(a, -1, self.a_group).wait()
        if self.base.split is not Split.COLUMN or self.spec.shared_b:
            b = start_gather(b, -2, self.b_group).wait()
        return a, b


class LinearAdapter(LoRAAdapter):
    """Adapt a dense linear: Megatron's own, TransformerEngine's, or the router's gate."""

    def forward(
        self, base_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the base with its adapter around it; returns what the base returns."""
        if not self.enabled:
            return base_forward(x, *args, **kwargs)
        if self.base.style is Style.LAYERNORM_LINEAR:
            return self._after_layernorm(base_forward(x, *args, **kwargs))
        if self.base.style is Style.ROUTER:
            return self._beside_router(base_forward, x)
        call = self._call(x)
        gather = kwargs.pop("runtime_gather_output", None)
        if gather is None:
            gather = getattr(self.base.module, "gather_output", False)
        if self.base.split is Split.COLUMN and hasattr(self.base.module, "gather_output"):
            # B's shard meets the columns of this rank: gather the sum, not the base's part.
            kwargs["runtime_gather_output"] = False

        def run_base(inner: Tensor) -> tuple[Tensor, Any]:
            return base_forward(inner, *args, **kwargs)

        y, bias = adapt(run_base, x, self.lora_A, self.b_rows(), call)
        if gather:
            y = gather_from_tensor_model_parallel_region(y, group=self.base.group)
        return y, bias

    def _after_layernorm(self, result: Any) -> Any:
        # NOTE: the local layer norm output only. The gathered one loses its gradient inside TE.
        if self.base.module.te_return_bias:
            y, bias, normed = result
        else:
            (y, normed), bias = result
        call = self._call(normed)
        return add_update(normed, y, self.lora_A, self.b_rows(), call), bias

    def _beside_router(self, base_forward: Callable[..., Any], x: Tensor) -> Tensor:
        # The gate may compute in fp32 or fp64; the update is made in the adapter's precision.
        logits = base_forward(x)
        update = x.new_zeros(*x.shape[:-1], self.base.out_features)
        update = add_update(x, update, self.lora_A, self.b_rows(), self._call(x))
        return logits + update.to(logits.dtype)


def named_adapters(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, LoRAAdapter]]:
    """Yield the adapters of model chunks, wrapped or not, with their global names."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAAdapter):
                yield module.spec.adapter_name, module


def bind(adapter: LoRAAdapter) -> None:
    """Wrap the base's forward (a router's gating) on its instance."""
    name = "gating" if adapter.base.style is Style.ROUTER else "forward"
    module = adapter.base.module
    if adapter.base.style is Style.LAYERNORM_LINEAR:
        module.return_layernorm_output = True
        module.return_layernorm_output_gathered = False
    setattr(module, name, functools.partial(adapter, getattr(module, name)))
