"""Experts of TransformerEngine's grouped linears by one pass between these (`gated_experts`)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from torch import Tensor

from megalora.builder import apply_lora
from megalora.checkpoint.gather import load_adapters
from megalora.config import LoRAConfig
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.parity import relative
from tests.dist.test_te import (
    EXPERTS,
    FFN,
    IN,
    SPLITS,
    TOLERANCE,
    Holder,
    copy_expert_weights,
    draw,
    drawn_factors,
    grouped_mlp,
)
from tests.support.te_on_cpu import kernels_of_torch

pytestmark = [
    pytest.mark.transformer_engine,
    pytest.mark.skipif(not te.HAVE_TE, reason="TransformerEngine is not asked for"),
]


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    with kernels_of_torch():
        yield


@pytest.mark.parametrize("where", ["grad", "main_grad"])
@over(Layout(), Layout(dp=2, ep=2))
def test_te_grouped_experts_by_one_pass_equal_the_module(layout: Layout, where: str) -> None:
    """x is large enough for a hook on dX in one of two runs."""
    w1, w2 = draw("w1", EXPERTS, 2 * FFN, IN), draw("w2", EXPERTS, IN, FFN)
    for times in (1, 400):
        with model_parallel(layout):
            experts, chunks = _adapted_experts(layout, w1, w2, where)
            found = _through_the_module(experts, chunks, times, where)
            assert "ClosedExpandBackward" in found.pop("node")
            experts.forward = experts.forward._base_forward
            expected = _through_the_module(experts, chunks, times, where)
            assert "Closed" not in expected.pop("node")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert relative(found[name], value) < TOLERANCE, name


def _drop(_experts: Any, adapter: Any) -> None:
    adapter.config = LoRAConfig(rank=6, dropout=0.5)


def _train_weight(experts: Any, _adapter: Any) -> None:
    experts.linear_fc2.weight0.requires_grad_()


def _freeze_factor(_experts: Any, adapter: Any) -> None:
    adapter.lora_A.requires_grad_(False)


def _hook(experts: Any, _adapter: Any) -> None:
    experts.linear_fc2.register_forward_pre_hook(lambda *_: None)


def _switch_off(_experts: Any, adapter: Any) -> None:
    adapter.enabled = False


@pytest.mark.parametrize("why", [_drop, _train_weight, _freeze_factor, _hook, _switch_off])
@over(Layout())
def test_what_the_pass_cannot_do_is_the_modules_own(layout: Layout, why: Any) -> None:
    w1, w2 = draw("w1", EXPERTS, 2 * FFN, IN), draw("w2", EXPERTS, IN, FFN)
    with model_parallel(layout):
        experts, _ = _adapted_experts(layout, w1, w2, "grad")
        why(experts, experts.linear_fc2_lora)
        x = draw("x", sum(SPLITS), IN).requires_grad_()
        z, _ = experts(x, torch.tensor(SPLITS), draw("p", len(x)))
        assert "Closed" not in z.grad_fn.name()


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_apply_probs_on_input": True},
        {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
        {"activation_func_clamp_value": 7.0},
        {"activation_func": quick_gelu},
    ],
    ids=lambda fields: next(iter(fields)),
)
@over(Layout())
def test_other_experts_are_the_modules_own(layout: Layout, fields: dict[str, Any]) -> None:
    w1, w2 = draw("w1", EXPERTS, 2 * FFN, IN), draw("w2", EXPERTS, IN, FFN)
    with model_parallel(layout):
        experts, _ = _adapted_experts(layout, w1, w2, "grad", **fields)
        assert "forward" not in vars(experts)


def _adapted_experts(
    layout: Layout, w1: Tensor, w2: Tensor, where: str, **fields: Any
) -> tuple[Any, Any]:
    num_local = EXPERTS // layout.ep
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    experts, config = grouped_mlp(layout, num_local, **fields)
    config.gradient_accumulation_fusion = where == "main_grad"
    copy_expert_weights(experts, w1, w2, range(first, first + num_local))
    chunks = apply_lora(
        [Holder(config, experts=experts)], LoRAConfig(rank=6, alpha=4.0, targets=("mlp",))
    )
    load_adapters(chunks, drawn_factors(chunks))
    return experts, chunks


def _through_the_module(experts: Any, chunks: Any, times: int, where: str) -> dict[str, Any]:
    """Return z, all gradients, and the name of z's node."""
    splits = torch.tensor([times * count for count in SPLITS[: experts.num_local_experts]])
    x, r = (draw(name, int(splits.sum()), IN) for name in ("x", "r"))
    x, probs = x.requires_grad_(), draw("p", len(x)).abs().requires_grad_()
    for parameter in chunks[0].parameters():
        parameter.grad, parameter.main_grad = None, torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
    z, _ = experts(x, splits, probs)
    (z * r).sum().backward()
    gradients = {
        name: getattr(parameter, where).clone()
        for name, parameter in chunks[0].named_parameters()
        if parameter.requires_grad
    }
    return {"z": z.detach(), "x": x.grad, "p": probs.grad, "node": z.grad_fn.name(), **gradients}
