"""Megatron on CPU and gloo trains the same in every layout."""

import functools
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import scaled_dot_product_attention

from megalora.mends import attention
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import DELTA_NET, MLA, MOE, SEQ_LENGTH, build_model
from tests.dist.support.training import NUM_SEQUENCES, Run, packed, train

TOLERANCE = 1e-5
DISTRIBUTED_OPTIMIZER = Run(distributed_optimizer=True, overlap=True)
PACKED = Run(cu_seqlens=(0, 4, 12, SEQ_LENGTH), micro_batch_size=1)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": MOE,
    "mla": MLA,
    "delta nets": {**DELTA_NET, "num_layers": 2},
}


@functools.cache
def history_of_one_rank(
    world_size: int, kind: str, cu_seqlens: tuple[int, ...] | None
) -> torch.Tensor:
    """Return [steps, 2], losses and gradient norms, of the unsharded model on one rank's batch."""
    alone = one_rank(Layout(dp=world_size))
    with model_parallel(alone):
        chunks = build_model(alone, **KINDS[kind])
        size = 1 if cu_seqlens else NUM_SEQUENCES
        run = Run(one_rank=True, micro_batch_size=size, cu_seqlens=cu_seqlens)
        return train(chunks, alone, run)


def assert_trains_as_one_rank(
    layout: Layout, kind: str, run: Run | None = None, **fields: Any
) -> None:
    run = run or Run()
    expected = history_of_one_rank(layout.world_size, kind, run.cu_seqlens)
    with model_parallel(layout):
        history = train(build_model(layout, **KINDS[kind], **fields), layout, run)
    torch.testing.assert_close(history, expected, rtol=TOLERANCE, atol=0)


@over(
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(dp=2),
    Layout(tp=2, sp=True, pp=2, vpp=2),
    Layout(tp=2, sp=True, cp=2),
)
def test_dense_layouts_train_as_one_rank(layout: Layout) -> None:
    assert_trains_as_one_rank(layout, "dense")


@over(
    Layout(dp=2, ep=2),
    Layout(tp=2, sp=True, etp=2),
    Layout(tp=2, sp=True, dp=2, ep=2, etp=2),
    Layout(tp=2, sp=True, dp=2, ep=4),
    Layout(pp=2, vpp=2, dp=2, ep=2),
)
def test_expert_layouts_train_as_one_rank(layout: Layout) -> None:
    assert_trains_as_one_rank(layout, "moe")


@over(Layout(tp=2), Layout(tp=2, sp=True), Layout(cp=2))
def test_latent_attention_trains_as_one_rank(layout: Layout) -> None:
    assert_trains_as_one_rank(layout, "mla")


@over(Layout(dp=2), Layout(tp=2, sp=True, dp=2))
def test_the_overlapped_distributed_optimizer_trains_as_one_rank(layout: Layout) -> None:
    assert_trains_as_one_rank(layout, "dense", DISTRIBUTED_OPTIMIZER)


@over(Layout(tp=2, sp=True))
def test_recompute_and_fused_gradient_accumulation_change_nothing(layout: Layout) -> None:
    assert_trains_as_one_rank(
        layout,
        "dense",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        gradient_accumulation_fusion=True,
    )


@over(Layout(tp=2, sp=True, dp=2))
def test_bf16_trains_close_to_fp32(layout: Layout) -> None:
    expected = history_of_one_rank(layout.world_size, "dense", None)
    with model_parallel(layout):
        history = train(build_model(layout, bf16=True), layout, DISTRIBUTED_OPTIMIZER)
    torch.testing.assert_close(history, expected, rtol=0.05, atol=0)
    assert not torch.equal(history, expected)


@pytest.mark.parametrize("kind", ["dense", "delta nets"])
@over(Layout(cp=2), Layout(tp=2, sp=True))
def test_packed_sequences_train_as_one_rank(layout: Layout, kind: str) -> None:
    assert_trains_as_one_rank(layout, kind, PACKED)


def _logits(
    model: Any, tokens: torch.Tensor, cu_seqlens: tuple[int, ...] | None = None
) -> torch.Tensor:
    positions = torch.arange(tokens.numel())[None]
    return model(tokens[None], positions, None, packed_seq_params=packed(cu_seqlens))


@pytest.mark.parametrize("fields", [{}, {"window_size": (3, 0)}, KINDS["delta nets"]])
@over(Layout())
def test_packed_sequences_do_not_see_each_other(layout: Layout, fields: dict[str, Any]) -> None:
    with model_parallel(layout):
        (model,) = build_model(layout, **fields)
        packed = _logits(model, torch.arange(SEQ_LENGTH), PACKED.cu_seqlens)
        alone = _logits(model, torch.arange(4, 12))
        mixed = _logits(model, torch.arange(SEQ_LENGTH))
    torch.testing.assert_close(packed[:, 4:12], alone)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mixed[:, 4:12], alone)


@over(Layout())
def test_packed_sequences_need_no_mask(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of who may look at whom would be as large as the square of a long row."""
    masks = []

    def attend(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", attend)
    with model_parallel(layout):
        (model,) = build_model(layout)
        _logits(model, torch.arange(SEQ_LENGTH), PACKED.cu_seqlens)
    assert masks
    assert set(masks) == {None}


@over(Layout(tp=2, sp=True))
def test_different_layouts_are_told_apart_by_their_weights(layout: Layout) -> None:
    """The negative control: one changed number in one rank's weights is noticed."""
    expected = history_of_one_rank(layout.world_size, "dense", None)
    with model_parallel(layout):
        chunks = build_model(layout)
        if parallel_state.get_tensor_model_parallel_rank() == 1:
            next(chunks[0].decoder.parameters()).data.view(-1)[0] += 0.1
        history = train(chunks, layout)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(history, expected, rtol=TOLERANCE, atol=0)
