"""What adapters add, counted: collectives, bytes that autograd keeps, and nothing for the base."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalora.builder import apply_lora, named_adapters, set_enabled
from tests.dist.support.cases import KINDS, TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import SEQ_LENGTH, build_model
from tests.dist.support.parity import draw_b, lora_config
from tests.dist.support.training import Run, train

NUM_TOKENS = SEQ_LENGTH
# Of models.DENSE: hidden, query + key + value, heads, 2 ffn, vocabulary; three projections
# of rank 4 in linear_qkv, two in linear_fc1.
H, QKV, HEADS, FC1, FFN, VOCAB, R = 32, 128, 64, 96, 48, 64, 4
AG, RS, AR = "all-gather", "reduce-scatter", "all-reduce"
NAMES = {"_allgather_base_": AG, "_reduce_scatter_base_": RS, "allreduce_": AR}


class Collectives(TorchDispatchMode):
    """Count collectives by name and by the elements of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("c10d.").partition(".")[0]
        if str(func).startswith("c10d."):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            self.found[NAMES.get(name, name), max(t.numel() for t in tensors)] += 1
        return func(*args, **(kwargs or {}))


def one_layer(layout: Layout, kind: str = "dense") -> Any:
    """Build a model of one layer with adapters whose B is not zero."""
    model = {**KINDS[kind].model, "num_layers": 1}
    (chunk,) = apply_lora(build_model(layout, **model), lora_config(kind))
    for name, adapter in named_adapters([chunk]):
        adapter.lora_B.data.copy_(draw_b(name, adapter.lora_B))
    return chunk


def run(chunk: Any, name: str, *, enabled: bool = True) -> None:
    """Run one linear forward and backward on this rank's part of NUM_TOKENS tokens."""
    set_enabled([chunk], enabled)
    linear = chunk.get_submodule(name)
    adapter = chunk.get_submodule(name + "_lora")
    is_column = adapter.base.split.value == "column"
    sharded = linear.sequence_parallel and is_column
    tokens = NUM_TOKENS // (adapter.base.tp_size if sharded else 1)
    width = adapter.base.in_features // (1 if is_column else adapter.base.tp_size)
    x = torch.randn(tokens, 1, width, requires_grad=True)
    y, _ = linear(x)
    y.sum().backward()


def counted(function: Callable[[], None]) -> Counter[tuple[str, int]]:
    with Collectives() as collectives:
        function()
    return collectives.found


ATTENTION, MLP = "decoder.layers.0.self_attention", "decoder.layers.0.mlp"


def column_sp(columns: int) -> list[tuple[str, int]]:
    s, a = NUM_TOKENS * columns, columns * H
    return [(AG, a), (AG, s), (AG, a), (RS, s), (RS, a)]


def column(columns: int) -> list[tuple[str, int]]:
    return [(AG, columns * H), (AG, columns * H), (AR, NUM_TOKENS * columns)]


ROW_SP = [(RS, NUM_TOKENS * R), (AG, H * R), (AG, NUM_TOKENS * R), (RS, H * R)]
ROW = [(AR, NUM_TOKENS * R), (AG, H * R)]
ADDED = {
    (f"{ATTENTION}.linear_qkv", TP2_SP): column_sp(3 * R),
    (f"{ATTENTION}.linear_proj", TP2_SP): ROW_SP,
    (f"{MLP}.linear_fc1", TP2_SP): column_sp(2 * R),
    (f"{MLP}.linear_fc2", TP2_SP): ROW_SP,
    ("output_layer", TP2_SP): column_sp(R),
    (f"{ATTENTION}.linear_qkv", TP2): column(3 * R),
    (f"{ATTENTION}.linear_proj", TP2): ROW,
    (f"{MLP}.linear_fc1", TP2): column(2 * R),
    (f"{MLP}.linear_fc2", TP2): ROW,
    ("output_layer", TP2): column(R),
}


@pytest.mark.world_2
@pytest.mark.parametrize(
    ("name", "layout"), list(ADDED), ids=lambda value: str(value).rpartition(".")[2]
)
def test_only_rank_thin_tensors_travel(name: str, layout: Layout) -> None:
    with model_parallel(layout):
        chunk = one_layer(layout)
        base = counted(lambda: run(chunk, name, enabled=False))
        both = counted(lambda: run(chunk, name))
    assert sum(base.values()), "the base's own collectives are not seen"
    assert not base - both
    assert both - base == Counter(ADDED[name, layout])
    assert max(elements for _, elements in both - base) < NUM_TOKENS * H


@over(Layout())
def test_one_rank_communicates_nothing(layout: Layout) -> None:
    with model_parallel(layout):
        chunk = one_layer(layout)
        assert not counted(lambda: run(chunk, f"{ATTENTION}.linear_qkv"))


# Of x each linear keeps what it is given, of s all tokens where it meets B; a row linear keeps its
# gathered B. Elements by (linear, layout), local sizes.
KEPT = {
    (f"{ATTENTION}.linear_qkv", TP2_SP): NUM_TOKENS // 2 * H + NUM_TOKENS * 3 * R,
    (f"{ATTENTION}.linear_qkv", TP2): NUM_TOKENS * H + NUM_TOKENS * 3 * R,
    (f"{ATTENTION}.linear_proj", TP2_SP): NUM_TOKENS * HEADS // 2 + NUM_TOKENS // 2 * R + H * R,
    (f"{ATTENTION}.linear_proj", TP2): NUM_TOKENS * HEADS // 2 + NUM_TOKENS * R + H * R,
    (f"{MLP}.linear_fc2", TP2_SP): NUM_TOKENS * FFN // 2 + NUM_TOKENS // 2 * R + H * R,
}


def kept_elements(chunk: Any, name: str, *, enabled: bool) -> int:
    """Return the elements of all storages that autograd keeps, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(chunk, name, enabled=enabled)
    return sum(kept.values())


@pytest.mark.world_2
@pytest.mark.parametrize(
    ("name", "layout"), list(KEPT), ids=lambda value: str(value).rpartition(".")[2]
)
def test_autograd_keeps_s_and_the_given_part_of_x_alone(name: str, layout: Layout) -> None:
    with model_parallel(layout):
        chunk = one_layer(layout)
        added = kept_elements(chunk, name, enabled=True) - kept_elements(chunk, name, enabled=False)
    assert added == KEPT[name, layout]


class Products(TorchDispatchMode):
    """Collect the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten.matmul")):
            self.shapes.add(tuple(result.shape[-2:]))
        return result


def weight_gradients(chunk: Any) -> set[str]:
    """Run forward and backward; return the base weights in whose shape a product was computed."""
    # No feature size of the model, so that no activation has the shape of a weight.
    tokens = torch.arange(23)[None]
    with Products() as products:
        chunk(tokens, tokens, None, labels=tokens).sum().backward()
    weights = {
        name: tuple(weight.shape)
        for name, weight in chunk.named_parameters()
        # NOTE: Megatron's RouterGatingLinearFunction computes its small one, frozen or not.
        if not any(part in name for part in ("_lora", "embedding", "router")) and weight.dim() == 2
    }
    return {
        name
        for name, shape in weights.items()
        if shape in products.shapes or shape[::-1] in products.shapes
    }


@over(Layout())
def test_no_weight_gradient_is_computed_for_the_base(layout: Layout) -> None:
    with model_parallel(layout):
        chunk = one_layer(layout, "experts")
        assert weight_gradients(chunk) == set()
        chunk.requires_grad_(True)
        found = weight_gradients(chunk)
    assert f"{ATTENTION}.linear_qkv.weight" in found, "the count cannot see a weight gradient"
    assert f"{MLP}.experts.local_experts.0.linear_fc1.weight" in found


def _adapter_numbers(chunks: list[Any]) -> int:
    return sum(p.numel() for _, adapter in named_adapters(chunks) for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["dense", "experts"])
@over(Layout(), TP2_SP)
def test_the_frozen_base_has_no_gradient_no_buffer_and_no_optimizer_state(
    layout: Layout, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.dist.support.training as training

    made: list[Any] = []
    monkeypatch.setattr(training, "get_megatron_optimizer", _spy(training, made))
    with model_parallel(layout):
        chunk = one_layer(layout, kind)
        train([chunk], layout, Run(num_steps=1))
        optimizer, models = made
        buffers = [b for m in models for b in (*m.buffers, *m.expert_parallel_buffers)]
        expected = _adapter_numbers([chunk])
        assert sum(p.numel() for b in buffers for p in b.params) == expected
        assert sum(t.numel() for t in _moments(optimizer)) == 2 * expected
        for name, parameter in chunk.named_parameters():
            if "_lora" not in name:
                assert parameter.grad is None, name
                assert getattr(parameter, "main_grad", None) is None, name
                assert not parameter.requires_grad, name


def _spy(training: Any, made: list[Any]) -> Callable[..., Any]:
    right = training.get_megatron_optimizer

    def make(config: Any, models: Any) -> Any:
        made.extend([right(config, models), models])
        return made[0]

    return make


def _moments(optimizer: Any) -> Iterator[Tensor]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    for one in chained:
        for state in one.optimizer.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])


@over(TP2_SP)
def test_the_gradient_norm_counts_every_shard_once(layout: Layout) -> None:
    with model_parallel(layout):
        chunk = one_layer(layout)
        local: list[Tensor] = []

        def take(_step: int) -> None:
            local.append(
                sum(
                    (
                        p.main_grad.double().square().sum()
                        for p in chunk.parameters()
                        if p.requires_grad
                    ),
                    torch.zeros((), dtype=torch.float64),
                )
            )

        history = train([chunk], layout, Run(num_steps=1, on_gradients=take))
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(local[0], group=group)
    assert float(history[0, 1]) == pytest.approx(float(local[0].sqrt()), rel=1e-6)
