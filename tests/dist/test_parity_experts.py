"""Experts at the edges: without tokens, with all of them, and spread over ranks or not."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.builder import apply_lora
from megalora.checkpoint.state import load_adapters
from tests.dist.support.cases import EP2, ETP2, KINDS, TP2_EP2
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import (
    EPS,
    assemble,
    largest,
    lora_config,
    relative,
    start_values,
)
from tests.dist.support.training import Run, train


@dataclasses.dataclass
class Result:
    """What a run with a fixed router gave."""

    history: Tensor
    gradients: dict[str, Tensor]
    end: dict[str, Tensor]


def send_all_tokens_to(chunks: list[Any], logits: tuple[float, ...]) -> None:
    """Replace the router's logits by constants, one for each expert."""

    def gating(x: Tensor) -> Tensor:
        return x.new_tensor(logits).expand(*x.shape[:-1], len(logits))

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            layer.mlp.router.gating = gating


def trained(
    layout: Layout,
    kind: str,
    logits: tuple[float, ...] | None,
    run: Run | None = None,
    **fields: Any,
) -> Result:
    gradients: dict[str, Tensor] = {}
    with model_parallel(layout):
        model = {**KINDS[kind].model, **fields}
        chunks = apply_lora(build_model(layout, **model), lora_config(kind, targets=("all",)))
        load_adapters(chunks, start_values(chunks))
        if logits is not None:
            send_all_tokens_to(chunks, logits)

        def keep(step: int) -> None:
            if step == 0:
                gradients.update(assemble(chunks, lambda p: p.main_grad.clone()))

        run = dataclasses.replace(run or Run(), on_gradients=keep, adam_eps=EPS)
        history = train(chunks, layout, run)
        return Result(history, gradients, assemble(chunks, torch.Tensor.detach))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@over(Layout(), EP2, ETP2, TP2_EP2)
def test_experts_without_tokens_get_exactly_no_gradient(layout: Layout, dispatcher: str) -> None:
    result = trained(
        layout, "experts", (2.0, -1.0, 3.0, -2.0), moe_token_dispatcher_type=dispatcher
    )
    experts = {key: g for key, g in result.gradients.items() if ".experts." in key}
    assert len(experts) == 4
    for gradient in experts.values():
        assert not gradient[[1, 3]].any()
        assert gradient[0].any()
        assert gradient[2].any()


@over(EP2, ETP2, TP2_EP2)
def test_all_tokens_to_one_expert_train_as_on_one_rank(layout: Layout) -> None:
    fields = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
    logits = (-1.0, -2.0, 3.0, -3.0)
    result = trained(layout, "experts", logits, **fields)
    alone = trained(one_rank(layout), "experts", logits, Run(one_rank=True), **fields)
    key = "decoder.layers.0.mlp.experts.linear_fc1_lora.lora_A"
    assert alone.gradients[key][2].any()
    assert not alone.gradients[key][:2].any()
    assert relative(result.history, alone.history) < 1e-5
    assert largest(result.gradients, alone.gradients) < 1e-5
    assert largest(result.end, alone.end) < 1e-5


@pytest.mark.world_4
@pytest.mark.parametrize("kind", ["experts", "shared-outer experts"])
def test_one_and_four_expert_parallel_ranks_give_the_same_run(kind: str) -> None:
    whole = trained(Layout(dp=4, ep=1), kind, None)
    spread = trained(Layout(dp=4, ep=4), kind, None)
    assert relative(spread.history, whole.history) < 1e-6
    assert largest(spread.end, whole.end) < 5e-6
