"""The kernels around experts as shapes: routing, permutation of tokens, the balancing loss."""

import torch
from torch import Tensor

from megalora.plan.engine.base import Kept


class _Permute(torch.autograd.Function):
    """Copies of tokens [n, h], sorted by expert, and their probabilities; a map of rows is kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, x: Tensor, probs: Tensor | None, num_out: int, num_experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_ids = x.new_empty(len(x), 2 * num_experts + 1, dtype=torch.int32)
        ctx.save_for_backward(row_ids)
        ctx.shapes = x.shape, None if probs is None else probs.shape
        own = x.new_empty(0) if probs is None else probs.new_empty(num_out)
        ctx.mark_non_differentiable(row_ids)
        return x.new_empty(num_out, x.shape[1]), own, row_ids

    @staticmethod
    def backward(ctx: Kept, dy: Tensor, d_probs: Tensor, _ids: Tensor):  # type: ignore[override]
        x_shape, probs_shape = ctx.shapes
        own = None if probs_shape is None else d_probs.new_empty(probs_shape)
        return dy.new_empty(x_shape), own, None, None


class _Unpermute(torch.autograd.Function):
    """Sums of the rows of each token; the rows are kept where they are weighted."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, x: Tensor, row_ids: Tensor, probs: Tensor | None, shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(row_ids, None if probs is None else x, probs)  # type: ignore[arg-type]
        ctx.num_rows = len(x)
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Kept, dy: Tensor):  # type: ignore[override]
        probs = ctx.saved_tensors[2]
        own = None if probs is None else torch.empty_like(probs)
        return dy.new_empty(ctx.num_rows, dy.shape[1]), None, own, None


class _SortChunks(torch.autograd.Function):
    """A copy of the rows in another order."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(x.new_empty(len(x), dtype=torch.int32))
        return torch.empty_like(x), x.new_empty(0) if probs is None else torch.empty_like(probs)

    @staticmethod
    def backward(ctx: Kept, dy: Tensor, d_probs: Tensor):  # type: ignore[override]
        own = torch.empty_like(d_probs) if ctx.needs_input_grad[1] else None
        return torch.empty_like(dy), own


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    """Return the permuted tokens and the map of rows."""
    out, _probs, row_ids = _permute(inp, None, routing_map, num_out_tokens)
    return out, row_ids


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permuted tokens, their probabilities and the map of rows."""
    out, own, row_ids = _permute(inp, probs, routing_map, num_out_tokens)
    return out, own, row_ids


def _permute(
    x: Tensor, probs: Tensor | None, routing_map: Tensor, num_out: int
) -> tuple[Tensor, Tensor, Tensor]:
    if num_out < 0:
        num_out = int(routing_map.sum())
    return _Permute.apply(x, probs, int(num_out), routing_map.shape[1])  # type: ignore[return-value]


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """Return the sums of each token's rows."""
    weights = merging_probs if probs is None else probs
    return _Unpermute.apply(inp, row_id_map, weights, restore_shape or inp.shape)  # type: ignore[return-value]


def moe_sort_chunks_by_index(inp: Tensor, *_: object) -> Tensor:
    """Return the rows in another order."""
    return _SortChunks.apply(inp, None)[0]  # type: ignore[index]


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    """Return the rows and their probabilities in another order."""
    return _SortChunks.apply(inp, probs)  # type: ignore[return-value]


class _Scores(torch.autograd.Function):
    """Scores [n, experts] and who is chosen; what the scores were made of is kept in fp32."""

    @staticmethod
    def forward(ctx: Kept, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        chosen = torch.empty_like(logits, dtype=torch.bool)
        kept = torch.empty_like(logits, dtype=torch.float32)
        ctx.save_for_backward(chosen, kept)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(chosen)
        return torch.empty_like(logits, dtype=dtype), chosen

    @staticmethod
    def backward(ctx: Kept, d_scores: Tensor, _chosen: Tensor):  # type: ignore[override]
        return torch.empty_like(d_scores, dtype=ctx.dtype), None


def fused_topk_with_score_function(
    logits: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    """Return the probabilities and the map of who is chosen."""
    return _Scores.apply(logits, logits.dtype)  # type: ignore[return-value]


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    """Return the map of who is chosen, and the scores in fp32 for the balancing loss."""
    scores, chosen = _Scores.apply(logits, torch.float32)  # type: ignore[misc]
    return chosen, scores


class _AuxLoss(torch.autograd.Function):
    """A number."""

    @staticmethod
    def forward(ctx: Kept, probs: Tensor, tokens_per_expert: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tokens_per_expert)
        ctx.shape = probs.shape
        return probs.new_empty(())

    @staticmethod
    def backward(ctx: Kept, d_loss: Tensor):  # type: ignore[override]
        return d_loss.new_empty(ctx.shape), None


def fused_moe_aux_loss(
    probs: Tensor, tokens_per_expert: Tensor, *_: object, **__: object
) -> Tensor:
    """Return the balancing loss."""
    return _AuxLoss.apply(probs, tokens_per_expert)  # type: ignore[return-value]
