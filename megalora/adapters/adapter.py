"""What all adapters have: parameters, their shards, and the route of each call.

An adapter is a sibling of its base (`linear_qkv` and `linear_qkv_lora`), so base keys never change.
It wraps the base's `forward` on the instance and is itself called as a module, so that Megatron's
parameter gathering, which hooks module calls, sees it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora import ops
from megalora.adapters.bases import Base, Split, State, state
from megalora.adapters.call import Call
from megalora.adapters.collectives import group_size, start_gather
from megalora.adapters.factors import Factor, Sharding, sizes
from megalora.adapters.kinds import kind_named
from megalora.adapters.routes import LOCAL_ROUTE, ROUTES, Route, ShardUse
from megalora.adapters.start import start_values
from megalora.config import LoRAConfig
from megalora.targets import AdapterSpec, Rows


class LoRAAdapter(torch.nn.Module):
    """Hold the shards of one base linear's adapter; subclasses call the base.

    Its parameters are the factors of its kind (`adapters.kinds`), for LoRA lora_A [P r, i/t] and
    lora_B [o/t, r], always sharded over the tensor-parallel group. Grouped adapters have the local
    experts as a first dimension, but for a factor that is shared over all experts (`shared_outer`),
    which is split over the dense group.
    start: the first values on the CPU, where the base gave them away (`adapters.pissa`).
    """

    base: Base
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    opens = False  # where calls of the base may be one op with the adapter: `adapters.opened`

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
        self.kind = kind_named(config.kind)
        self.start: dict[str, Tensor] = {}
        self._calls: dict[State | None, Call] = {}
        self.a_group = dense_group if spec.shared_a else base.group
        self.b_group = dense_group if spec.shared_b else base.group
        self.expert_group = expert_group
        self.shardings = {factor.name: self._sharding(factor) for factor in self.kind.factors}
        for name, sharding in self.shardings.items():
            self.register_parameter(name, self._parameter(sharding, dtype, device))

    @property
    def a_experts(self) -> int:
        """Local experts along A, 0 where it has no such dimension."""
        return 0 if self.spec.shared_a else self.base.num_experts

    @property
    def b_experts(self) -> int:
        """Local experts along B, 0 where it has no such dimension."""
        return 0 if self.spec.shared_b else self.base.num_experts

    @property
    def own_rows(self) -> int:
        """Rows of this rank's weights that it adapts, the first ones."""
        is_cut = self.base.split is Split.COLUMN
        return self.spec.rows.size // (self.base.tp_size if is_cut else 1)

    def factors(self) -> Iterator[tuple[torch.nn.Parameter, Sharding]]:
        """Yield this rank's shard of every factor, and how it lies over the ranks."""
        for name, sharding in self.shardings.items():
            yield getattr(self, name), sharding

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the shards of A [(E,) P r, i/t] and B [(E,) o/t, r] that the factors make."""
        # Each call asks: torch's own mapping of the factors, for they are all the parameters.
        return self.kind.pair(cast(dict[str, torch.nn.Parameter], self._parameters))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give every factor its start values, which are the same on every layout."""
        for param, sharding in self.factors():
            values = start_values(sharding, self.spec.adapter_name, self.config.seed)
            param.copy_(torch.as_tensor(values))

    def bind(self) -> None:
        """Wrap the base's forward on its instance."""
        module = self.base.module
        self.base_forward = module.forward
        module.forward = functools.partial(self, module.forward)

    def extra_repr(self) -> str:
        """Describe the adapter in print(model)."""
        shapes = (f"{s.factor.name}={tuple(param.shape)}" for param, s in self.factors())
        return ", ".join([f"rank={self.spec.rank}", f"scale={self.spec.scale:g}", *shapes])

    def sharded_tensors(self, prefix: str) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """Return all factors as sharded tensors with their global shapes and offsets."""
        return {
            (key := prefix + sharding.factor.name): sharding.stored(
                key, param, (0, 0, self._replica(param))
            )
            for param, sharding in self.factors()
        }

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Give nothing to a traversal of the base: `checkpoint.state` collects the adapters."""
        return {}

    def _sharding(self, factor: Factor) -> Sharding:
        counts, out = sizes(self.spec, self.base.in_features), factor.is_output
        return Sharding(
            factor=factor,
            shape=tuple(counts[axis] for axis in factor.axes),
            rows=self.spec.rows if out else Rows(blocks=(self.base.in_features,)),
            group=self.b_group if out else self.a_group,
            num_experts=self.b_experts if out else self.a_experts,
            expert_group=self.expert_group,
        )

    def _parameter(
        self, sharding: Sharding, dtype: torch.dtype, device: torch.device
    ) -> torch.nn.Parameter:
        factor = sharding.factor
        try:
            shape = sharding.own_shape()
        except ValueError as error:
            raise ValueError(
                f"{factor.name} of {self.spec.name} has {error}: leave it out of lora_targets"
            ) from None
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        # Nothing is replicated over tensor-parallel ranks: the gradient norm counts every shard.
        param.tensor_model_parallel = True  # type: ignore[attr-defined]
        param.partition_dim = len(shape) + factor.dim  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]
        # Experts are reduced over expert data parallel ranks, even where these are all of them
        # (EP 1): the optimizer's state then has the same parts on every topology.
        shared = self.spec.shared_b if factor.is_output else self.spec.shared_a
        param.allreduce = shared or not self.base.is_expert  # type: ignore[attr-defined]
        param.lora_factor = factor.name  # type: ignore[attr-defined]
        return param

    def _replica(self, param: torch.nn.Parameter) -> int:
        """Return the number of this rank among those that hold the same shard."""
        if param.allreduce:  # type: ignore[attr-defined]
            return parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_rank()

    def route(self, tensor_state: State) -> Route:
        """Return how s travels and what is done with the shards, in a state of the wide tensor."""
        if self._is_on_one_rank():
            return LOCAL_ROUTE
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
        if not self._drops():
            return None
        seed = torch.randint(2**62, (1,), device=device)
        distinct = self.base.split is Split.ROW or tensor_state is State.TOKEN_SHARD
        return seed + self.base.tp_rank if distinct else seed

    def _call(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Call:
        """Return all about one call with x and this rank's A and B but these."""
        tensor_state = state(self.base)
        seed = self._seed(tensor_state, x.device)
        a_param, b_param = self._fused(a), self._fused(b)
        if offsets is None and seed is None:
            return self._kept_call(tensor_state, a_param, b_param)
        return dataclasses.replace(
            self._kept_call(tensor_state, a_param, b_param),
            a_offsets=offsets if self.a_experts else None,
            b_offsets=offsets if self.b_experts else None,
            dropout=self.config.dropout if seed is not None else 0.0,
            seed=seed,
        )

    def _local_call(self, a: Tensor, b: Tensor, seed: Tensor | None = None) -> Call:
        """Return all about a call within this rank: one that opens its base, or of one expert."""
        call = self._kept_call(None, self._fused(a), self._fused(b))
        if seed is None:
            return call
        return dataclasses.replace(call, dropout=self.config.dropout, seed=seed)

    def _kept_call(
        self,
        tensor_state: State | None,
        a_param: torch.nn.Parameter | None,
        b_param: torch.nn.Parameter | None,
    ) -> Call:
        """Return what the last call in this state had, unless it differs; None: within the rank."""
        kept = self._calls.get(tensor_state)
        if kept is None or kept.a_param is not a_param or kept.b_param is not b_param:
            is_local = tensor_state is None
            kept = self._calls[tensor_state] = Call(
                ops=self.ops,
                route=LOCAL_ROUTE if is_local else self.route(tensor_state),
                scale=self.spec.scale,
                segments=self.segments(),
                columns=None if is_local or self._adapts_all() else self.own_rows,
                group=None if is_local else self.base.group,
                a_group=None if is_local else self.a_group,
                b_group=None if is_local else self.b_group,
                a_param=a_param,
                b_param=b_param,
            )
        return kept

    def _is_whole(self) -> bool:
        """Say whether this rank has the whole weight, and both whole factors for all of it."""
        return self._adapts_all() and self._is_on_one_rank()

    def _is_on_one_rank(self) -> bool:
        groups = (self.base.group, self.a_group, self.b_group)
        return all(group_size(group) == 1 for group in groups)

    def _adapts_all(self) -> bool:
        return self.spec.rows.size == self.base.out_features

    def _drops(self) -> bool:
        return self.config.dropout > 0.0 and self.training

    def _fused(self, factor: Tensor) -> torch.nn.Parameter | None:
        """Return a parameter where Megatron asks that backward adds to its main_grad."""
        asked = getattr(self.base.module.config, "gradient_accumulation_fusion", False)
        if not asked or not isinstance(factor, torch.nn.Parameter):
            return None
        # NOTE: Megatron FSDP wants its buffer overwritten: what is in it is stale.
        added_to = getattr(factor, "main_grad", None) is not None
        is_fsdp = hasattr(factor, "__fsdp_param__") or getattr(factor, "overwrite_main_grad", False)
        return factor if added_to and not is_fsdp else None

    def segments(self) -> list[int]:
        """Return the segments of the output columns that this rank's B covers when it is used."""
        # Only a column linear's B is used as the shard it is.
        if self.base.split is Split.COLUMN:
            return self.spec.rows.segments(self.base.tp_rank, self.base.tp_size)
        return self.spec.rows.segments(0, 1)

    def by_expert(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return A [P r, i] and B [o, r] of every local expert, or the one pair of a dense base."""
        num = max(1, self.base.num_experts)
        all_a = a.unbind(0) if self.a_experts else (a,) * num
        all_b = b.unbind(0) if self.b_experts else (b,) * num
        return list(zip(all_a, all_b, strict=True))

    @torch.no_grad()
    def full_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return A [P r, i/split] and B [o/split, r] as each of this rank's weights needs them."""
        a, b = (factor.detach() for factor in self.pair())
        if self.base.split is not Split.ROW or self.spec.shared_a:
            a = start_gather(a, -1, self.a_group).wait()
        if self.base.split is not Split.COLUMN or self.spec.shared_b:
            b = start_gather(b, -2, self.b_group).wait()
        return self.by_expert(a, b)


def named_adapters(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, LoRAAdapter]]:
    """Yield the adapters of model chunks, wrapped or not, with their global names."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAAdapter):
                yield module.spec.adapter_name, module
