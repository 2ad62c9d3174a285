"""Gradients that backward adds to Megatron's main_grad itself: gradient accumulation fusion."""

import dataclasses
from typing import Any

import pytest
import torch

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.state import load_adapters
from tests.dist.support.cases import KINDS, TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import Tensors, assemble, largest, lora_config, start_values
from tests.dist.support.training import NUM_SEQUENCES, Run, train

KIND = "latent attention"  # column, row and duplicated linears


def gradients(layout: Layout, run: Run, **fields: Any) -> tuple[Tensors, set[bool]]:
    """Return the adapters' main_grad after a step, and whether backward has filled it itself."""
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS[KIND].model, **fields)
        apply_lora(chunks, lora_config(KIND, dropout=0.25))
        load_adapters(chunks, start_values(chunks))
        found: list[tuple[Tensors, set[bool]]] = []

        def keep(_step: int) -> None:
            params = [p for _, adapter in named_adapters(chunks) for p in adapter.parameters()]
            filled = {bool(p.grad_added_to_main_grad) for p in params}  # type: ignore[attr-defined]
            found.append((assemble(chunks, lambda p: p.main_grad.clone()), filled))

        torch.manual_seed(5)
        train(chunks, layout, dataclasses.replace(run, num_steps=1, on_gradients=keep))
        return found[0]


@over(Layout(), TP2, TP2_SP)
def test_backward_fills_main_grad_where_megatron_asks_for_it(layout: Layout) -> None:
    fused, filled = gradients(layout, Run(), gradient_accumulation_fusion=True)
    usual, not_filled = gradients(layout, Run())
    assert (filled, not_filled) == ({True}, {False})
    assert largest(fused, usual) < 1e-6


@pytest.mark.parametrize("fuses", [True, False])
@over(Layout())
def test_bf16_gradients_reach_fp32_without_a_rounding_only_if_fused(
    layout: Layout, fuses: bool
) -> None:
    # A sum over several microbatches is no bf16 number either way.
    run = Run(micro_batch_size=NUM_SEQUENCES)
    found, _ = gradients(layout, run, gradient_accumulation_fusion=fuses, bf16=True)
    first = found["decoder.layers.0.mlp.linear_fc2_lora.lora_B"]
    assert first.dtype == torch.float32
    assert torch.equal(first, first.bfloat16().float()) is not fuses
