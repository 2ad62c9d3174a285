"""Adapted linears that open their base: what they compute, and which calls leave it closed."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megalora.adapters import gated, on_one_rank, one_gemm, opened, sandwich
from megalora.adapters.linear import LinearAdapter
from megalora.builder import apply_lora, named_adapters
from megalora.config import LoRAConfig
from tests.dist.support.cases import KINDS, TP2
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_config, build_model
from tests.dist.support.parity import draw_b, lora_config
from tests.dist.support.training import NUM_SEQUENCES, Run, train
from tests.support.op_cases import relative_error

TOKENS, IN, RANK, SCALE = (5, 2), 12, 3, 1.5
# linear_qkv has three projections, which are interleaved by query group.
NAMES = {ColumnParallelLinear: "linear_qkv", RowParallelLinear: "linear_proj"}
KIND_OF_BASE = pytest.mark.parametrize("kind", list(NAMES), ids=lambda kind: kind.__name__)
single = over(Layout())


class Holder(torch.nn.Module):
    """What apply_lora needs of a model chunk around a single linear."""

    def __init__(self, config: Any, name: str, linear: torch.nn.Module) -> None:
        super().__init__()
        self.config = config
        self.add_module(name, linear)

    def sharded_state_dict(self, **_kwargs: Any) -> dict[str, Any]:
        return {}


def draw(name: str, *shape: int) -> Tensor:
    return draw_b(name, torch.empty(shape)) * 4


def build(kind: Any, config: Any, *, bias: bool = False, skip_bias_add: bool = False) -> Any:
    """Return a linear of Megatron's, with random weights."""
    out = (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels
    rows = {"input_is_parallel": True} if kind is RowParallelLinear else {}
    linear = kind(
        IN, out, config=config, init_method=torch.nn.init.zeros_, bias=bias,
        skip_bias_add=skip_bias_add, tp_group=parallel_state.get_tensor_model_parallel_group(),
        **rows,
    )  # fmt: skip
    for name, parameter in linear.named_parameters():
        parameter.data = draw(name, *parameter.shape)
    return linear


def adapt(linear: Any, **fields: Any) -> LinearAdapter:
    """Put an adapter with a B that is not zero on a linear."""
    name = NAMES.get(type(linear), "linear_qkv")
    config = LoRAConfig(rank=RANK, alpha=SCALE * RANK, targets=(name,), **fields)
    ((_, adapter),) = named_adapters(apply_lora([Holder(linear.config, name, linear)], config))
    for key, factor in (("A", adapter.lora_A), ("B", adapter.lora_B)):
        factor.data = draw(key, *factor.shape)
    assert isinstance(adapter, LinearAdapter)
    return adapter


@contextlib.contextmanager
def adapted(kind: Any, layout: Layout, **flags: bool) -> Iterator[Any]:
    """Give an adapted linear and its adapter."""
    with model_parallel(layout):
        linear = build(kind, build_config(layout), **flags)
        yield linear, adapt(linear)


def opens(y: Tensor) -> bool:
    """Say whether y comes from an opened base; it comes from the sandwich if not."""
    name = type(y.grad_fn).__name__
    assert name in ("OpenedLinearBackward", "UpdateBackward", "AfterBaseBackward"), name
    return name == "OpenedLinearBackward"


def both_passes(linear: Any, adapter: LinearAdapter, x: Tensor, *args: Any) -> list[Any]:
    """Return y, the bias that is left to the caller, and the gradients of x, A and B."""
    leaves = [x.clone().requires_grad_(), *adapter.parameters()]
    y, bias = linear(leaves[0], *args)
    return [y, bias, *torch.autograd.grad(y, leaves, draw("dy", *y.shape))]


def merged(linear: Any, adapter: LinearAdapter) -> Tensor:
    """Return W + c B A, each row of B with the A of its projection."""
    period = torch.tensor(adapter.segments() or [linear.output_size])
    owner = torch.arange(len(period)).repeat_interleave(period)
    owner = owner.repeat(linear.output_size // len(owner))
    rows_of_a = adapter.lora_A.unflatten(0, (len(period), RANK))[owner]
    return linear.weight + SCALE * torch.einsum("or,ori->oi", adapter.lora_B, rows_of_a)


# === What it computes ===


@pytest.mark.parametrize("flags", [{}, {"bias": True}, {"bias": True, "skip_bias_add": True}])
@KIND_OF_BASE
@single
def test_an_opened_base_gives_what_a_closed_one_does(
    layout: Layout, kind: Any, flags: dict[str, bool]
) -> None:
    with adapted(kind, layout, **flags) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        found = both_passes(linear, adapter, x)
        adapter.opens = False
        expected = both_passes(linear, adapter, x)
        assert opens(found[0])
        assert not opens(expected[0])
        assert found.pop(1) is expected.pop(1) is (linear.bias if linear.skip_bias_add else None)
        torch.testing.assert_close(found, expected)


@KIND_OF_BASE
@single
def test_an_opened_base_is_the_merged_weight(layout: Layout, kind: Any) -> None:
    with adapted(kind, layout, bias=True) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, *gradients = both_passes(linear, adapter, x)
        leaves = [x.requires_grad_(), adapter.lora_A, adapter.lora_B]
        expected = x @ merged(linear, adapter).T + linear.bias
        torch.testing.assert_close(y, expected)
        right = torch.autograd.grad(expected, leaves, draw("dy", *y.shape))
        torch.testing.assert_close(gradients, list(right))


@single
def test_a_call_with_another_weight_uses_that(layout: Layout) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, _):
        x, own = draw("x", *TOKENS, IN), linear.weight
        tied = torch.nn.Parameter(draw("tied", *own.shape), requires_grad=False)
        by_position, by_name = linear(x, tied)[0], linear(x, weight=tied)[0]
        linear.weight = tied
        expected = linear(x)[0]
        assert opens(by_position)
        assert opens(by_name)
        assert torch.equal(by_position, expected)
        assert torch.equal(by_name, expected)
        linear.weight = None
        with pytest.raises(RuntimeError, match="weight was not supplied"):
            linear(x)


@pytest.mark.parametrize("needs_dx", [True, False])
@single
def test_main_grad_gets_the_gradients_where_megatron_asks(layout: Layout, needs_dx: bool) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, _, *expected = both_passes(linear, adapter, x)
        linear.config.gradient_accumulation_fusion = True
        for factor in adapter.parameters():
            factor.main_grad = torch.ones_like(factor)  # type: ignore[attr-defined]
        y, _ = linear(x.clone().requires_grad_(needs_dx))
        assert opens(y)
        y.backward(draw("dy", *y.shape))
        for factor, gradient in zip(adapter.parameters(), expected, strict=True):
            torch.testing.assert_close(factor.main_grad, gradient + 1.0)  # type: ignore[attr-defined]
            assert factor.grad_added_to_main_grad  # type: ignore[attr-defined]
            assert factor.grad is not None  # what DDP's hook waits for


@pytest.mark.parametrize("fused", ["lora_A", "lora_B"])
@single
def test_one_factor_alone_may_have_a_main_grad(layout: Layout, fused: str) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        _, _, *expected = both_passes(linear, adapter, x)
        linear.config.gradient_accumulation_fusion = True
        getattr(adapter, fused).main_grad = torch.ones_like(getattr(adapter, fused))
        leaf = x.clone().requires_grad_()
        y, _ = linear(leaf)
        y.backward(draw("dy", *y.shape))
        found = {"x": leaf.grad, "lora_A": adapter.lora_A.grad, "lora_B": adapter.lora_B.grad}
        found[fused] = getattr(adapter, fused).main_grad - 1.0
        torch.testing.assert_close(list(found.values()), expected)


@single
def test_a_recomputed_call_has_the_same_gradients(layout: Layout) -> None:
    with adapted(RowParallelLinear, layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, *expected = both_passes(linear, adapter, x)
        leaf = x.clone().requires_grad_()
        again = tensor_parallel.checkpoint(lambda x: linear(x)[0], False, leaf)
        assert torch.equal(again, y)
        again.backward(draw("dy", *y.shape))
        found = [leaf.grad, adapter.lora_A.grad, adapter.lora_B.grad]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B"])
@single
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(layout: Layout, frozen: str) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        _, _, *gradients = both_passes(linear, adapter, x)
        expected = dict(zip(("x", "lora_A", "lora_B"), gradients, strict=True))
        leaves = {"x": x.clone(), "lora_A": adapter.lora_A, "lora_B": adapter.lora_B}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        y, _ = linear(leaves["x"])
        assert opens(y)
        y.backward(draw("dy", *y.shape))
        assert leaves.pop(frozen).grad is None
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, expected[name])


@single
def test_evaluation_and_switching_off_go_through_it(layout: Layout) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        with torch.no_grad():
            torch.testing.assert_close(linear(x)[0], x @ merged(linear, adapter).T)
            adapter.enabled = False
            torch.testing.assert_close(linear(x)[0], x @ linear.weight.T)


# === Which calls open the base ===


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the nodes of every way."""
    nodes = {"opened": opened.OpenedLinear, "gated": gated.OpenedGatedMLP}
    nodes["closed"] = on_one_rank.Update
    found = dict.fromkeys(nodes, 0)
    for way, node in nodes.items():

        def count(*args: Any, right: Any = node.forward, way: str = way) -> Any:
            found[way] += 1
            return right(*args)

        monkeypatch.setattr(node, "forward", staticmethod(count))
    return found


@pytest.mark.parametrize(
    ("kind", "linears", "mlps"),
    [
        ("dense", 2 * 2 + 1, 2),
        ("tied embeddings", 2 * 2 + 1, 2),
        ("latent attention", 5 + 1, 1),
        ("experts", 2 + 1, 4),  # the router, whose gate is no linear, stays closed
    ],
)
@single
def test_every_linear_of_a_model_on_one_rank_opens(
    layout: Layout, kind: str, linears: int, mlps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS[kind].model)
        apply_lora(chunks, lora_config(kind))
        found = counted(monkeypatch)
        train(chunks, layout, Run(num_steps=1, micro_batch_size=NUM_SEQUENCES))
        assert found == {"opened": linears, "gated": mlps, "closed": int(kind == "experts")}


@over(TP2)
def test_a_weight_that_is_split_over_ranks_stays_closed(layout: Layout) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        assert not adapter.opens
        assert not opens(linear(draw("x", *TOKENS, IN).requires_grad_())[0])


CLOSED_BY_A_CALL: dict[str, Callable[[Any, LinearAdapter], Any]] = {
    "a trained weight": lambda linear, _: linear.weight.requires_grad_(),
    "a trained bias": lambda linear, _: linear.bias.requires_grad_(),
    "dropout": lambda _, adapter: setattr(adapter, "config", LoRAConfig(rank=RANK, dropout=0.5)),
}


@pytest.mark.parametrize("why", CLOSED_BY_A_CALL)
@single
def test_a_call_that_asks_for_more_stays_closed(layout: Layout, why: str) -> None:
    with adapted(ColumnParallelLinear, layout, bias=True) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        assert opens(linear(x)[0])
        CLOSED_BY_A_CALL[why](linear, adapter)
        assert not opens(linear(x)[0])


@single
def test_a_call_under_autocast_stays_closed(layout: Layout) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, _):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = linear(draw("x", *TOKENS, IN).requires_grad_())
        assert y.dtype == torch.bfloat16
        assert not opens(y)


@pytest.mark.parametrize("inside", [True, False], ids=["around the base", "after the base"])
@single
def test_a_closed_base_under_autocast_learns_as_torch_does(layout: Layout, inside: bool) -> None:
    """By torch's linear: Megatron's frozen one has no backward under autocast on a CPU."""
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        leaves = [draw("x", *TOKENS, IN).requires_grad_(), *adapter.parameters()]
        call = adapter._call(*leaves)
        with torch.autocast("cpu", torch.bfloat16):
            base = functools.partial(torch.nn.functional.linear, weight=linear.weight)
            expected = torch.nn.functional.linear(leaves[0], merged(linear, adapter))
            if inside:
                y, _ = sandwich.adapt(lambda x: (base(x), None), *leaves, call)
            else:
                y = sandwich.add_update(leaves[0], base(leaves[0]), *leaves[1:], call)
        dy = draw("dy", *y.shape).bfloat16()
        found, right = (torch.autograd.grad(one, leaves, dy) for one in (y, expected))
        assert [y.dtype, *(one.dtype for one in found)] == [torch.bfloat16, *[torch.float32] * 3]
        for one, other in zip((y, *found), (expected, *right), strict=True):
            assert relative_error(one.float(), other.float()) < 2e-2


@single
def test_float64_stays_as_it_is_under_autocast(layout: Layout) -> None:
    with adapted(ColumnParallelLinear, layout) as (linear, adapter):
        given = [one.double() for one in (draw("x", *TOKENS, IN), *adapter.parameters())]
        weight = linear.weight.double()
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = sandwich.adapt(lambda x: (x @ weight.T, None), *given, adapter._call(*given))
        assert y.dtype == torch.float64
        assert relative_error(y, given[0] @ merged(linear, adapter).double().T) < 1e-6


@single
def test_dropout_in_evaluation_opens(layout: Layout) -> None:
    with model_parallel(layout):
        adapter = adapt(linear := build(ColumnParallelLinear, build_config(layout)), dropout=0.5)
        x = draw("x", *TOKENS, IN)
        assert not opens(linear(x)[0])
        adapter.eval()
        assert opens(linear(x)[0])


class Quantized(torch.nn.Parameter):
    """Not a plain tensor, as TransformerEngine's weights in FP8 are not."""


class Wrapped(ColumnParallelLinear):
    """May do more than its parent."""


@single
def test_only_plain_tensors_of_one_dtype_open(layout: Layout) -> None:
    with model_parallel(layout):
        linear = build(ColumnParallelLinear, build_config(layout), bias=True)
        linear.requires_grad_(False)
        x = draw("x", *TOKENS, IN)
        assert one_gemm.open_weight(linear, x) is linear.weight
        assert one_gemm.open_weight(linear, x.double()) is None
        assert one_gemm.open_weight(linear, Quantized(x)) is None
        assert one_gemm.open_weight(linear, x, Quantized(linear.weight.data, False)) is None
        linear.bias.data = linear.bias.data.double()
        assert one_gemm.open_weight(linear, x) is None


@pytest.mark.parametrize("state", ["is_fp8_enabled", "is_fp8_calibration"])
@single
def test_nothing_opens_where_transformer_engine_quantizes(
    layout: Layout, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"is_fp8_enabled": lambda: False, "is_fp8_calibration": lambda: False}
    with model_parallel(layout):
        linear = build(ColumnParallelLinear, build_config(layout)).requires_grad_(False)
        x = draw("x", *TOKENS, IN)
        monkeypatch.setattr(one_gemm.te, "HAVE_TE", True)
        for is_on, expected in ((False, linear.weight), (True, None)):
            now = SimpleNamespace(**{**states, state: lambda is_on=is_on: is_on})
            monkeypatch.setattr(one_gemm.te, "FP8GlobalStateManager", now, raising=False)
            assert one_gemm.open_weight(linear, x) is expected


@pytest.mark.parametrize(
    "asked",
    [
        "cpu_offloading",
        "defer_embedding_wgrad_compute",
        "delay_wgrad_compute",
        "fine_grained_activation_offloading",
        "tp_comm_overlap",
    ],
)
@single
def test_a_base_that_is_asked_for_more_stays_closed(layout: Layout, asked: str) -> None:
    with model_parallel(layout):
        linear = build(ColumnParallelLinear, build_config(layout))
        assert one_gemm.is_one_gemm(linear)
        setattr(linear.config, asked, True)
        assert not one_gemm.is_one_gemm(linear)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: setattr(linear, "gtp_remat_size", 2),
        lambda linear: setattr(linear, "te_quant_params", object()),
        lambda linear: setattr(linear, "forward", lambda x: (x, None)),
        lambda linear: setattr(linear, "__class__", Wrapped),
        lambda linear: setattr(linear.config, "pipeline_model_parallel_size", 2),
    ],
    ids=[
        *("split otherwise", "quantized by itself", "forward replaced", "another class"),
        "in a pipeline",
    ],
)
@single
def test_a_base_that_is_more_than_its_gemm_stays_closed(layout: Layout, change: Any) -> None:
    with model_parallel(layout):
        linear = build(ColumnParallelLinear, build_config(layout))
        change(linear)
        assert not one_gemm.is_one_gemm(linear)


@single
def test_nothing_opens_where_transformer_engine_is_inspected(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_parallel(layout):
        linear = build(ColumnParallelLinear, build_config(layout))
        inspection = SimpleNamespace(DEBUG_MANAGER=None)
        monkeypatch.setitem(sys.modules, "nvdlfw_inspect.api", inspection)  # type: ignore[arg-type]
        assert one_gemm.is_one_gemm(linear)
        inspection.DEBUG_MANAGER = object()
        assert not one_gemm.is_one_gemm(linear)
