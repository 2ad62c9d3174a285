"""Megatron differentiates a model in pieces; frozen ones before the first adapter lose nothing."""

from typing import Any

import pytest
import torch

from megalora.builder import apply_lora
from megalora.checkpoint.state import load_adapters
from tests.dist.support.cases import EP2, KINDS
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import Tensors, assemble, largest, lora_config, start_values
from tests.dist.support.training import Run, train

KIND = "experts in 4 layers"


def gradients(layout: Layout, targets: tuple[str, ...], **fields: Any) -> Tensors:
    """Return the adapters' gradients in a step, and the loss."""
    found: list[Tensors] = []
    with model_parallel(layout):
        chunks = build_model(layout, **{**KINDS[KIND].model, "bf16": True, **fields})
        apply_lora(chunks, lora_config(KIND, targets=targets))
        load_adapters(chunks, start_values(chunks))
        run = Run(
            num_steps=1,
            on_gradients=lambda _: found.append(assemble(chunks, lambda p: p.main_grad.clone())),
        )
        history = train(chunks, layout, run)
    return {**found[0], "loss": history[:, 0]}


# The first layer is dense in the last case.
@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (("all",), {}),
        (("*.layers.3.*",), {}),
        (("unembed",), {}),
        (("all",), {"moe_layer_freq": [0, 1, 1, 1]}),
    ],
    ids=["all", "the last layer", "the unembedding", "a dense first layer"],
)
@over(EP2)
def test_the_schedule_plan_gives_the_same_gradients(
    layout: Layout, targets: tuple[str, ...], fields: dict[str, Any]
) -> None:
    plan = gradients(layout, targets, overlap_moe_expert_parallel_comm=True, **fields)
    assert largest(plan, gradients(layout, targets, **fields)) < 1e-6


@over(Layout())
def test_layers_without_adapters_are_not_differentiated_for_the_unembedding(
    layout: Layout,
) -> None:
    requires: dict[str, bool] = {}
    with model_parallel(layout):
        for target in ("unembed", "linear_fc2"):
            (chunk,) = apply_lora(build_model(layout), lora_config("dense", targets=(target,)))
            tokens = torch.zeros(1, 4, dtype=torch.long)
            chunk.decoder.layers[0].register_forward_pre_hook(
                lambda _module, _args, kwargs, target=target: requires.update(
                    {target: kwargs["hidden_states"].requires_grad}
                ),
                with_kwargs=True,
            )
            chunk(tokens, torch.arange(4)[None], None)
    assert requires == {"unembed": False, "linear_fc2": True}
