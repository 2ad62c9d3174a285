"""Gated MLPs whose linears open together: what they compute, and which calls stay the MLP's own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters import gated
from megalora.adapters.gated import OpenedGatedMLP
from megalora.builder import apply_lora, named_adapters, set_enabled
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import draw_b, lora_config
from tests.support.op_cases import relative_error

single = over(Layout())
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}


@contextlib.contextmanager
def an_mlp(layout: Layout, fields: dict[str, Any] | None = None) -> Iterator[tuple[Any, Any]]:
    """Give the adapted MLP of a model's one layer, or its experts, and the chunk; B is not zero."""
    fields = fields or {}
    with model_parallel(layout):
        chunk: Any
        kind = "experts" if "num_moe_experts" in fields else "dense"
        (chunk,) = apply_lora(build_model(layout, num_layers=1, **fields), lora_config(kind))
        for name, adapter in named_adapters([chunk]):
            adapter.lora_B.data.copy_(draw_b(name, adapter.lora_B))
        yield chunk.decoder.layers[0].mlp, chunk


def nodes_of(y: Tensor) -> list[str]:
    """Return the names of all autograd nodes before y."""
    found, seen = [y.grad_fn], {y.grad_fn}
    for node in found:
        for before, _ in node.next_functions if node else ():
            if before is not None and before not in seen:
                seen.add(before)
                found.append(before)
    return [node.name() for node in found if node]


def is_gated(y: Tensor) -> bool:
    """Say whether y comes from the one node of a gated MLP."""
    return "OpenedGatedMLPBackward" in nodes_of(y)


def results(mlp: Any, chunk: Any, x: Tensor) -> list[Tensor]:
    """Return y, and the gradients of x and of every parameter that has one."""
    chunk.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y, _ = mlp(leaf)
    y.backward(draw_b("dy", y))
    gradients = [leaf.grad, *(parameter.grad for parameter in chunk.parameters())]
    return [y.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def inputs(chunk: Any) -> Tensor:
    return draw_b("x", torch.empty(6, 2, chunk.config.hidden_size)) * 8


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
@single
def test_one_node_computes_what_two_adapters_and_the_activation_do(
    layout: Layout, experts: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with an_mlp(layout, experts) as (mlp, chunk):
        x = inputs(chunk)
        assert is_gated(mlp(x.requires_grad_())[0])
        found = results(mlp, chunk, x)
        monkeypatch.setattr(gated, "takes_weights", lambda *_: False)
        assert not is_gated(mlp(x)[0])
        expected = results(mlp, chunk, x)
        assert len(found) == len(expected) > 5
        for one, other in zip(found, expected, strict=True):
            assert other.abs().max() > 0
            assert relative_error(one, other) < 1e-6


@single
def test_a_lost_gradient_of_the_routers_weights_is_noticed(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = OpenedGatedMLP.backward

    def without_weights(ctx: Any, dz: Tensor) -> Any:
        found = right(ctx, dz)
        return *found[:5], found[5] * 0.0, *found[6:]

    monkeypatch.setattr(OpenedGatedMLP, "backward", staticmethod(without_weights))
    with pytest.raises(AssertionError):
        test_one_node_computes_what_two_adapters_and_the_activation_do(layout, EXPERTS, monkeypatch)


def _drop(mlp: Any, chunk: Any) -> None:
    config = lora_config("dense", dropout=0.5)
    mlp.linear_fc2_lora.config = config


def _train_weight(mlp: Any, _chunk: Any) -> None:
    mlp.linear_fc1.weight.requires_grad_()


def _freeze_factor(mlp: Any, _chunk: Any) -> None:
    mlp.linear_fc2_lora.lora_A.requires_grad_(False)


def _hook_linear(mlp: Any, _chunk: Any) -> None:
    mlp.linear_fc2.register_forward_pre_hook(lambda *_: None)


def _hook_adapter(mlp: Any, _chunk: Any) -> None:
    mlp.linear_fc1_lora.register_forward_pre_hook(lambda *_: None)


def _switch_off(_mlp: Any, chunk: Any) -> None:
    set_enabled([chunk], False)


OWN: dict[str, Callable[[Any, Any], None]] = {
    "dropout": _drop,
    "a trained weight": _train_weight,
    "a frozen factor": _freeze_factor,
    "a hook on a linear": _hook_linear,
    "a hook on an adapter, by which Megatron gathers parameters": _hook_adapter,
    "adapters switched off": _switch_off,
}


@pytest.mark.parametrize("why", OWN)
@single
def test_what_the_node_cannot_do_is_the_mlps_own(layout: Layout, why: str) -> None:
    with an_mlp(layout) as (mlp, chunk):
        x = inputs(chunk).requires_grad_()
        assert is_gated(mlp(x)[0])
        OWN[why](mlp, chunk)
        assert not is_gated(mlp(x)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"activation_func_clamp_value": 7.0},
        {"glu_linear_offset": 1.0},
        {"activation_func": torch.nn.functional.gelu},
        {"add_bias_linear": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
@single
def test_another_activation_is_the_mlps_own(layout: Layout, fields: dict[str, Any]) -> None:
    with an_mlp(layout, fields) as (mlp, chunk):
        assert not is_gated(mlp(inputs(chunk).requires_grad_())[0])


@single
def test_evaluation_is_the_same(layout: Layout) -> None:
    with an_mlp(layout) as (mlp, chunk):
        x = inputs(chunk)
        y, _ = mlp(x.requires_grad_())
        with torch.no_grad():
            torch.testing.assert_close(mlp(x)[0], y)


@single
def test_a_global_hook_sees_both_linears(layout: Layout) -> None:
    """As a profiler or a counter of FLOPs sets one."""
    with an_mlp(layout) as (mlp, chunk):
        seen: list[torch.nn.Module] = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append(module)
        )
        try:
            mlp(inputs(chunk).requires_grad_())
        finally:
            handle.remove()
        assert mlp.linear_fc1 in seen
        assert mlp.linear_fc2 in seen
