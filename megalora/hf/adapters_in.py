"""Hugging Face factors into full Megatron adapter tensors; see `megalora.hf.adapters`."""

import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors, check_factors, summarise
from megalora.hf.fused import join_qkv
from megalora.hf.head_rows import check_head_rows
from megalora.hf.joined import split_joined
from megalora.hf.linears import Linear, locate
from megalora.hf.misfits import why_not_in_model
from megalora.hf.wide_parts import split_wide
from megalora.model.facts import delta_parts
from megalora.model.shape import ModelShape
from megalora.targets import matching_target

FreshA = Callable[[str, tuple[int, ...], int], Tensor]
Pair = tuple[Tensor, Tensor]
Modules = dict[tuple[int, str], LoRAFactors]


def from_hf(
    factors: Mapping[str, LoRAFactors],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    padded_vocab_size: int | None = None,
    fresh_a: FreshA | None = None,
) -> dict[str, Tensor]:
    """Turn factors by Hugging Face name into full adapter tensors by global Megatron name.

    Only linears of which a projection has factors are returned. A lower rank is filled with zeros,
    a scale is folded into B in fp32. What is filled, and a projection without factors beside one
    that has some, has B zero; its A comes from fresh_a(name, shape, seed) where that is given
    (`megalora.adapters.start.draw_uniform`), so that training can use it, and is zero otherwise.
    padded_vocab_size: rows of Megatron's output_layer.
    Raises ValueError for a module that this model or configuration has no adapter for, for a higher
    rank, and for factors that differ where the configuration shares them.
    """
    check_factors(factors)
    factors = split_wide(split_joined(factors, shape), config, shape)
    if shape.vocab_size:
        check_head_rows(factors, shape.vocab_size)
    join = _Join(config, shape, fresh_a)
    tensors: dict[str, Tensor] = {}
    for (layer, linear), modules in _group(factors, config, shape).items():
        name = linear.name(layer)
        if linear.is_expert:
            a, b = join.experts(name, modules, linear)
        else:
            a, b = join.linear(f"{name}_lora", {p: m for (_, p), m in modules.items()}, linear)
        if linear.is_unembedding and padded_vocab_size:
            b = _pad_vocabulary(b, padded_vocab_size)
        tensors[f"{name}_lora.lora_A"], tensors[f"{name}_lora.lora_B"] = a, b
    beyond = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if beyond:
        raise ValueError(
            f"adapter leaves its precision in {summarise(beyond)}, at the scale of lora_alpha "
            f"{config.alpha:g}: give an alpha nearer to the adapter's own"
        )
    return tensors


def _pad_vocabulary(b: Tensor, rows: int) -> Tensor:
    if rows < b.shape[0]:
        raise ValueError(f"lm_head has {b.shape[0]} rows, Megatron's padded vocabulary {rows}")
    return torch.cat([b, b.new_zeros(rows - b.shape[0], b.shape[1])])


def _group(
    factors: Mapping[str, LoRAFactors], config: LoRAConfig, shape: ModelShape
) -> dict[tuple[int | None, Linear], Modules]:
    """Collect the factors of each Megatron linear by (expert, projection)."""
    groups: dict[tuple[int | None, Linear], Modules] = {}
    unknown: list[str] = []
    untargeted: dict[str, str] = {}
    gates: list[str] = []
    for name, module in factors.items():
        place = locate(name, shape)
        if place is None:
            unknown.append(name)
            continue
        layer, linear, expert, projection = place
        if linear.is_delta_gate(projection) and not config.delta_gates:
            gates.append(name)
        if matching_target(linear.name(layer), config.targets) is None:
            untargeted[name] = linear.megatron
        groups.setdefault((layer, linear.adapted(config, layer)), {})[expert, projection] = module
    if unknown:
        raise ValueError(
            f"adapter has modules that this model has no adapter for: {summarise(unknown)}: "
            f"{why_not_in_model(unknown, shape)}"
        )
    if gates:
        raise ValueError(
            f"adapter has what makes beta and alpha of gated delta nets: {summarise(gates)}: adapt "
            "them too, by --lora-delta-gates"
        )
    if untargeted:
        wanted = shlex.join([*config.targets, *sorted(set(untargeted.values()))])
        raise ValueError(
            f"adapter has modules outside of lora_targets {list(config.targets)}: "
            f"{summarise(list(untargeted))}: add them to --lora-targets, as by "
            f"--lora-targets {wanted}"
        )
    return groups


@dataclass(frozen=True, slots=True)
class _Join:
    """Join the factors of projections and experts into the tensors of one Megatron adapter."""

    config: LoRAConfig
    shape: ModelShape
    fresh_a: FreshA | None

    def experts(self, name: str, modules: Modules, linear: Linear) -> Pair:
        """Stack the experts [E, ...]; a factor that they share is returned once."""
        shared_outer = self.config.expert_mode == "shared_outer"
        by_expert: list[dict[str, LoRAFactors]] = [{} for _ in range(self.shape.num_moe_experts)]
        for (expert, projection), module in modules.items():
            by_expert[expert][projection] = module
        pairs: list[Pair | None] = []
        for expert, own in enumerate(by_expert):
            # The name by which this adapter's start values are drawn.
            one = f"{name}_lora" if shared_outer else f"{name}_lora.{expert}"
            pairs.append(self.linear(one, own, linear) if own else None)
        sizes = next(pair for pair in pairs if pair)
        filled = [
            pair or self._blank(f"{name}_lora.{expert}", linear, sizes)
            for expert, pair in enumerate(pairs)
        ]
        a, b = torch.stack([a for a, _ in filled]), torch.stack([b for _, b in filled])
        if shared_outer and linear.is_fc1:
            a = _one_of_all(name, "lora_A", a)
        if shared_outer and not linear.is_fc1:
            b = _one_of_all(name, "lora_B", b)
        return a, b

    def linear(self, name: str, modules: dict[str, LoRAFactors], linear: Linear) -> Pair:
        """Stack the projections of one linear, those without factors being blank."""
        rank = linear.rank(self.config, self.shape)
        fitted = {p: self._fit(f"{name} {p}", m, linear, rank) for p, m in modules.items()}
        outs = self._rows(name, linear, fitted)
        one = next(iter(fitted.values()))
        dtype = functools.reduce(torch.promote_types, [m.lora_A.dtype for m in fitted.values()])
        like = one.lora_A.to(dtype)
        # Drawing takes longer than all the rest: not where every value is overwritten.
        is_full = [m.rank for m in fitted.values()] == [rank] * len(linear.projections)
        a = (
            like.new_empty(len(linear.projections), *like.shape)
            if is_full
            else self._start_a(name, linear, rank, like)
        )
        rows = []
        for index, (projection, out) in enumerate(zip(linear.projections, outs, strict=True)):
            if projection in fitted:
                module = fitted[projection]
                a[index, : module.rank] = module.lora_A
                rows.append(module.resized(rank).lora_B)
            else:
                rows.append(one.lora_B.new_zeros(out, rank))
        # Mixed precisions join at the highest.
        b = join_qkv(rows[0], rows[1], rows[2], self.shape) if linear.is_qkv else torch.cat(rows)
        if not self.config.shared_a:
            return a.flatten(0, 1), b
        return self._one_a(name, a, [linear.projections.index(p) for p in fitted]), b

    def _fit(self, name: str, module: LoRAFactors, linear: Linear, rank: int) -> LoRAFactors:
        module = module.trimmed()
        if module.rank > rank:
            flag = "--lora-expert-rank" if linear.is_expert else "--lora-rank"
            raise ValueError(
                f"{name} has rank {module.rank}, this configuration has {rank}: "
                f"use {flag} {module.rank} or more"
            )
        return module.rescaled(self.config.scale(rank))

    def _start_a(self, name: str, linear: Linear, rank: int, like: Tensor) -> Tensor:
        """Return [P, r, in], zero or fresh, for factors to be written into."""
        count, num_in = len(linear.projections), like.shape[1]
        if self.fresh_a is None:
            return like.new_zeros(count, rank, num_in)
        if self.config.shared_a:
            return self.fresh_a(name, (rank, num_in), self.config.seed).to(like).repeat(count, 1, 1)
        fresh = self.fresh_a(name, (count * rank, num_in), self.config.seed)
        return fresh.to(like).view(count, rank, num_in)

    def _rows(self, name: str, linear: Linear, fitted: dict[str, LoRAFactors]) -> list[int]:
        """Return the rows of every projection; the given ones must agree with the model."""
        one = next(iter(fitted.values()))
        heads, d = self.shape.heads_per_group * self.shape.num_query_groups, self.shape.kv_channels
        kv, gates = self.shape.num_query_groups * d, 2 if self.shape.attention_output_gate else 1
        outs = (
            [gates * heads * d, kv, kv]
            if linear.is_qkv
            else [one.lora_B.shape[0]] * len(linear.projections)
        )
        if linear.is_joint_down:
            outs = list(self.shape.latent_rows)
        if linear.is_of_delta_net:
            outs = list(delta_parts(self.shape).values())[: len(linear.projections)]
        if linear.is_unembedding and self.shape.vocab_size:
            outs = [self.shape.vocab_size]
        if linear.is_router:
            outs = [self.shape.num_moe_experts]
        wrong = [
            f"{p} {m.lora_B.shape[0]}"
            for p, m in fitted.items()
            if m.lora_B.shape[0] != outs[linear.projections.index(p)]
            or m.lora_A.shape[1] != one.lora_A.shape[1]
        ]
        if wrong:
            raise ValueError(
                f"{name}: sizes of {', '.join(wrong)} do not fit the model's {outs} rows: "
                "the adapter belongs to another model"
            )
        return outs

    def _one_a(self, name: str, a: Tensor, given: list[int]) -> Tensor:
        first = a[given[0]]
        if any(not torch.equal(first, a[index]) for index in given):
            raise ValueError(
                f"{name}: projections have an A each, which shared_a cannot hold: "
                "leave shared_a out"
            )
        return first

    def _blank(self, name: str, linear: Linear, sizes: Pair) -> Pair:
        """Return factors of an expert that has none, but for what it shares with the others."""
        a, b = torch.zeros_like(sizes[0]), torch.zeros_like(sizes[1])
        if self.config.expert_mode == "shared_outer":
            return (sizes[0], b) if linear.is_fc1 else (a, sizes[1])
        if self.fresh_a is not None:
            a.copy_(self.fresh_a(name, tuple(a.shape), self.config.seed))
        return a, b


def _one_of_all(name: str, factor: str, stacked: Tensor) -> Tensor:
    if not (stacked == stacked[:1]).all():
        raise ValueError(
            f"{name}: {factor} differs from expert to expert, which expert_mode `shared_outer` "
            "cannot hold: use expert_mode `per_expert`"
        )
    return stacked[0]
