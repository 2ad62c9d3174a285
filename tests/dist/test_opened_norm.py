"""TransformerEngine's linears behind a layer norm: what opens them, and what they then compute."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.extensions import transformer_engine as te
from torch import Tensor

from megalora.adapters.linear import LayerNormLinearAdapter
from megalora.builder import apply_lora, named_adapters
from megalora.config import LoRAConfig
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_config
from tests.dist.test_opened import IN, RANK, SCALE, TOKENS, Holder, both_passes, draw, opens
from tests.support.te_on_cpu import kernels_of_torch

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(not te.HAVE_TE, reason="TransformerEngine is not asked for"),
]
OUT = 16
NORMS = [
    {"normalization": "RMSNorm"},
    {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True},
    {"normalization": "LayerNorm", "layernorm_epsilon": 0.1},
]
BIASES = [{}, {"bias": True}, {"bias": True, "skip_bias_add": True}]
single = over(Layout())


@contextlib.contextmanager
def adapted(layout: Layout, norm: dict[str, Any] = NORMS[0], **flags: bool) -> Iterator[Any]:
    """Give a linear behind a norm with random weights, and its adapter, whose B is not zero."""
    with kernels_of_torch(), model_parallel(layout):
        config = build_config(layout, gated_linear_unit=False, **norm)
        linear: Any = te.TELayerNormColumnParallelLinear(
            IN, OUT, config=config, init_method=torch.nn.init.zeros_, gather_output=False,
            is_expert=False, tp_group=parallel_state.get_tensor_model_parallel_group(),
            **{"bias": False, "skip_bias_add": False, **flags},
        )  # fmt: skip
        for name, parameter in linear.named_parameters():
            parameter.data = draw(name, *parameter.shape)
        lora = LoRAConfig(rank=RANK, alpha=SCALE * RANK, targets=("linear_fc1",))
        chunks = apply_lora([Holder(config, "linear_fc1", linear)], lora)
        ((_, adapter),) = named_adapters(chunks)
        for key, factor in (("A", adapter.lora_A), ("B", adapter.lora_B)):
            factor.data = draw(key, *factor.shape)
        yield linear, adapter


def normed_by(linear: Any, x: Tensor) -> Tensor:
    """Return the layer norm of x, by torch."""
    config, weight = linear.config, linear.layer_norm_weight
    weight = weight + float(config.layernorm_zero_centered_gamma)
    shape, eps = weight.shape, config.layernorm_epsilon
    if config.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(x, shape, weight, eps)
    return torch.nn.functional.layer_norm(x, shape, weight, linear.layer_norm_bias, eps)


# === What it computes ===


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("flags", BIASES)
@single
def test_opened_behind_a_norm_is_what_a_closed_base_gives(
    layout: Layout, norm: dict[str, Any], flags: dict[str, bool]
) -> None:
    with adapted(layout, norm, **flags) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        found = both_passes(linear, adapter, x)
        adapter.opens = False
        expected = both_passes(linear, adapter, x)
        assert opens(found[0])
        left = linear.bias if linear.te_return_bias else None
        assert found.pop(1) is expected.pop(1) is left
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", NORMS)
@single
def test_opened_behind_a_norm_is_the_merged_weight(layout: Layout, norm: dict[str, Any]) -> None:
    with adapted(layout, norm, bias=True) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, *gradients = both_passes(linear, adapter, x)
        leaves = [x.requires_grad_(), adapter.lora_A, adapter.lora_B]
        weight = linear.weight + SCALE * adapter.lora_B @ adapter.lora_A
        expected = normed_by(linear, x) @ weight.T + linear.bias
        torch.testing.assert_close(y, expected)
        right = torch.autograd.grad(expected, leaves, draw("dy", *y.shape))
        torch.testing.assert_close(gradients, list(right))


@pytest.mark.parametrize("norm", NORMS)
@single
def test_the_norm_of_an_opened_base_is_its_own_bit_for_bit(
    layout: Layout, norm: dict[str, Any]
) -> None:
    with adapted(layout, norm) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        base_forward = linear.forward.args[0]
        (_, expected), _ = base_forward(x)
        assert torch.equal(adapter._norm(x), expected)


@single
def test_a_recomputed_call_behind_a_norm_has_the_same_gradients(layout: Layout) -> None:
    with adapted(layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, *expected = both_passes(linear, adapter, x)
        leaf = x.clone().requires_grad_()
        again = tensor_parallel.checkpoint(lambda x: linear(x)[0], False, leaf)
        assert torch.equal(again, y)
        again.backward(draw("dy", *y.shape))
        found = [leaf.grad, adapter.lora_A.grad, adapter.lora_B.grad]
        torch.testing.assert_close(found, expected)


@single
def test_an_x_without_gradient_and_evaluation_open_it_too(layout: Layout) -> None:
    with adapted(layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        y, _, _, *expected = both_passes(linear, adapter, x)
        again, _ = linear(x)
        assert opens(again)
        factors = [adapter.lora_A, adapter.lora_B]
        found = torch.autograd.grad(again, factors, draw("dy", *y.shape))
        torch.testing.assert_close(list(found), expected)
        with torch.no_grad():
            assert torch.equal(linear(x)[0], y)


@single
def test_the_norm_keeps_no_parameters_of_its_own(layout: Layout) -> None:
    with adapted(layout, NORMS[2]) as (linear, adapter):
        modules = (linear, adapter)
        before = [[name for name, _ in module.named_parameters()] for module in modules]
        both_passes(linear, adapter, draw("x", *TOKENS, IN))
        assert [[name for name, _ in module.named_parameters()] for module in modules] == before
        assert not list(adapter.children())
        kept = adapter._kept_norm
        both_passes(linear, adapter, draw("x", *TOKENS, IN))
        assert adapter._kept_norm is kept
        assert kept.weight is linear.layer_norm_weight
        assert kept.bias is linear.layer_norm_bias
        assert linear.layer_norm_weight.grad is None
        assert linear.layer_norm_bias.grad is None


@pytest.mark.parametrize("name", ["layer_norm_weight", "layer_norm_bias"])
@single
def test_the_norm_follows_a_parameter_that_takes_the_place_of_another(
    layout: Layout, name: str
) -> None:
    with adapted(layout, NORMS[2]) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        linear(x)
        setattr(linear, name, torch.nn.Parameter(draw("other", IN), requires_grad=False))
        weight = linear.weight + SCALE * adapter.lora_B @ adapter.lora_A
        y, _ = linear(x)
        assert opens(y)
        torch.testing.assert_close(y, normed_by(linear, x) @ weight.T)


# === Which calls open the base ===

CLOSED: dict[str, Callable[[Any, LayerNormLinearAdapter], Any]] = {
    "a trained norm": lambda linear, _: linear.layer_norm_weight.requires_grad_(),
    "a trained bias of the norm": lambda linear, _: linear.layer_norm_bias.requires_grad_(),
    "a trained weight": lambda linear, _: linear.weight.requires_grad_(),
    "dropout": lambda _, adapter: setattr(adapter, "config", LoRAConfig(rank=RANK, dropout=0.5)),
}


@pytest.mark.parametrize("why", CLOSED)
@single
def test_a_call_behind_a_norm_that_asks_for_more_stays_closed(layout: Layout, why: str) -> None:
    with adapted(layout, NORMS[2]) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        assert opens(linear(x)[0])
        CLOSED[why](linear, adapter)
        assert not opens(linear(x)[0])


@single
def test_a_trained_norm_gets_its_gradient(layout: Layout) -> None:
    with adapted(layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        linear(x)
        gamma = linear.layer_norm_weight.requires_grad_()
        y, _ = linear(x)
        weight = linear.weight + SCALE * adapter.lora_B @ adapter.lora_A
        expected = normed_by(linear, x) @ weight.T
        dy = draw("dy", *y.shape)
        (found,), (right,) = (torch.autograd.grad(out, gamma, dy) for out in (y, expected))
        torch.testing.assert_close(found, right)


@single
def test_switched_off_behind_a_norm_the_base_runs_alone(layout: Layout) -> None:
    with adapted(layout) as (linear, adapter):
        x = draw("x", *TOKENS, IN)
        adapter.enabled = False
        y, bias = linear(x)
        assert bias is None
        torch.testing.assert_close(y, normed_by(linear, x) @ linear.weight.T)
