"""Dropout in adapters: masks that fit the state of the tensor, and come back on recomputation."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.builder import apply_lora
from megalora.checkpoint.gather import load_adapters
from megalora.ops.philox import dropout_mask
from tests.dist.support.cases import ETP2, KINDS, RECOMPUTED, TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import draw_b, lora_config, relative, start_values
from tests.dist.support.training import Run, train

P = 0.4
ATTENTION = "decoder.layers.0.self_attention"


def adapted(layout: Layout, kind: str = "dense", p: float = P, **fields: Any) -> list[Any]:
    chunks = build_model(layout, **{**KINDS[kind].model, **fields})
    apply_lora(chunks, lora_config(kind, dropout=p, targets=("all",)))
    load_adapters(chunks, start_values(chunks))
    return chunks


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor | None]]:
    """Record the seed of every call by the adapter's name."""
    found: dict[str, list[Tensor | None]] = {}
    draw = LoRAAdapter._seed

    def record(self: LoRAAdapter, *args: Any) -> Tensor | None:
        seed = draw(self, *args)
        found.setdefault(self.spec.name, []).append(seed)
        return seed

    monkeypatch.setattr(LoRAAdapter, "_seed", record)
    return found


def on_all_ranks(seed: Tensor) -> list[int]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, int(seed))
    return gathered


@over(TP2, TP2_SP)
def test_masks_differ_between_shards_and_agree_between_replicas(
    layout: Layout, seeds: dict[str, list[Tensor | None]]
) -> None:
    with model_parallel(layout):
        train(adapted(layout), layout, Run(num_steps=1))
        for name, drawn in seeds.items():
            assert drawn[0] is not None
            assert drawn[1] is not None
            assert int(drawn[0]) != int(drawn[1]), "each microbatch has its own mask"
            first, second = on_all_ranks(drawn[0])
            sharded = layout.sp or name.endswith(("linear_proj", "linear_fc2"))
            assert (first != second) == sharded, name


@over(Layout(), TP2, TP2_SP, ETP2)
def test_recomputation_repeats_the_mask(layout: Layout) -> None:
    # Megatron trains experts under sequence parallelism alone.
    kind = "dense" if layout == TP2 else "experts"
    with model_parallel(layout):
        kept = train(adapted(layout, kind), layout)
    with model_parallel(layout):
        again = train(adapted(layout, kind, **RECOMPUTED["fields"]), layout)
    with model_parallel(layout):
        without = train(adapted(layout, kind, p=0.0), layout)
    assert relative(again, kept) < 1e-6
    assert relative(without, kept) > 1e-4


def every(seeds: dict[str, list[Tensor | None]]) -> list[Tensor | None]:
    return [seed for of_one in seeds.values() for seed in of_one]


@over(Layout(), TP2_SP)
def test_evaluation_drops_nothing(layout: Layout, seeds: dict[str, list[Tensor | None]]) -> None:
    with model_parallel(layout):
        (chunk,) = adapted(layout)
        tokens = torch.arange(8)[None]
        chunk(tokens, tokens, None)
        assert seeds
        assert all(seed is not None for seed in every(seeds))
        seeds.clear()
        chunk.eval()
        chunk(tokens, tokens, None)
        assert all(seed is None for seed in every(seeds))


@pytest.mark.parametrize("name", [f"{ATTENTION}.linear_qkv", f"{ATTENTION}.linear_proj"])
@over(Layout(), TP2, TP2_SP)
def test_outputs_and_gradients_are_those_of_the_recorded_masks(
    layout: Layout, name: str, seeds: dict[str, list[Tensor | None]]
) -> None:
    """One linear against plain torch, from each rank's shard of x, masked by its own seed."""
    tokens = 8
    is_row = name.endswith("proj")
    with model_parallel(layout):
        (chunk,) = adapted(layout)
        linear, adapter = chunk.get_submodule(name), chunk.get_submodule(f"{name}_lora")
        shard_dim = -1 if is_row else (0 if layout.sp else None)
        rank, size = dist.get_rank(), layout.tp
        x = draw_b("x", torch.empty(tokens, 1, adapter.base.in_features)) * 5
        r = draw_b("r", torch.empty(tokens, 1, adapter.base.out_features)) * 5
        own_x = x if shard_dim is None else x.chunk(size, shard_dim)[rank]
        own_x = own_x.clone().requires_grad_()
        y, _ = linear(own_x)
        r_dim = (0 if layout.sp else None) if is_row else -1
        own_r = r if r_dim is None else r.chunk(size, r_dim)[rank]
        (y * own_r).sum().backward()

        seed = seeds[name][0]
        assert seed is not None
        mask = dropout_mask(own_x.shape, P, seed) / (1 - P)
        if shard_dim is not None:
            parts = [torch.empty_like(mask) for _ in range(size)]
            dist.all_gather(parts, mask)
            mask = torch.cat(parts, shard_dim)
        a, b, w = (_whole(t, d, size) for t, d in _sharded_tensors(adapter, is_row))
        x_leaf, a_leaf, b_leaf = (t.clone().requires_grad_() for t in (x, a, b))
        s = (x_leaf * mask) @ a_leaf.T
        expected = x_leaf @ w.T + adapter.spec.scale * _expand(s, b_leaf, adapter)
        (expected * r).sum().backward()

        own = expected if r_dim is None else expected.chunk(size, r_dim)[rank]
        assert relative(y.detach(), own.detach()) < 1e-6
        dx = x_leaf.grad if shard_dim is None else x_leaf.grad.chunk(size, shard_dim)[rank]
        assert relative(own_x.grad, dx) < 1e-6
        assert relative(adapter.lora_A.grad, a_leaf.grad.chunk(size, 1)[rank]) < 1e-6
        assert relative(adapter.lora_B.grad, b_leaf.grad.chunk(size, 0)[rank]) < 1e-6


def _sharded_tensors(adapter: Any, is_row: bool) -> list[tuple[Tensor, int]]:
    weight = adapter.base.module.weight
    return [(adapter.lora_A, 1), (adapter.lora_B, 0), (weight, 1 if is_row else 0)]


def _whole(shard: Tensor, dim: int, size: int) -> Tensor:
    parts = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(parts, shard.detach().contiguous())
    return torch.cat(parts, dim)


def _expand(s: Tensor, b: Tensor, adapter: Any) -> Tensor:
    """Return s Bᵀ, projections taken from linear_qkv's periods."""
    rank, segments = adapter.spec.rank, adapter.spec.rows.period
    if not segments:
        return s @ b.T
    row_projection = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
    row_projection = row_projection.repeat(b.shape[0] // sum(segments))
    blocks = s.unflatten(-1, (len(segments), rank))[..., row_projection, :]
    return (blocks * b).sum(-1)
