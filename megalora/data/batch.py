"""From a data iterator to Megatron's forward step: batch, boundaries, loss.

Imports Megatron, so `megalora.cpu.install` comes first where it is wanted.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from torch.distributed import ProcessGroup

from megalora.data.arguments import AttentionFormat, attention_format, datasets_from_args
from megalora.data.indexed import indexed_datasets

if TYPE_CHECKING:
    from megatron.core.models.common.model_chunk_schedule_plan import (
        TransformerModelChunkSchedulePlan,
    )

_KEYS = ["tokens", "labels", "loss_mask", "position_ids", "padding_mask", "cu_seqlens"]
_SEQUENCE_KEYS = _KEYS[:-1]


class Model(Protocol):
    """What `forward_step` runs: a model of Megatron's, or its wrapper of gradients."""

    def __call__(self, *inputs: torch.Tensor | None, **named: object) -> torch.Tensor:
        """Return the losses [b, s/cp]."""
        ...

    def build_schedule_plan(
        self, *inputs: torch.Tensor | None, **named: object
    ) -> "TransformerModelChunkSchedulePlan":
        """Return the plan by which Megatron overlaps expert communication."""
        ...


class Batch(NamedTuple):
    """One microbatch on this rank: [b, s/cp], or [1, b * s/cp] in the thd format.

    num_tokens: [], trained tokens of the microbatch on all context-parallel ranks together.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    num_tokens: torch.Tensor
    position_ids: torch.Tensor
    padding_mask: torch.Tensor
    attention_mask: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None


def datasets_provider(num_samples: list[int | None], vp_stage: int | None = None) -> Any:
    """Build what --dataset, or Megatron's --data-path, names, as `pretrain` asks for it.

    Only tensor-parallel rank 0 reads data, so the others get None three times.
    """
    args: Any = get_args()
    is_read = parallel_state.get_tensor_model_parallel_rank() == 0
    if args.dataset is None:
        tokenizer: Any = get_tokenizer()
        return indexed_datasets(args, tokenizer, num_samples, is_read)
    if not is_read:
        return None, None, None
    return datasets_from_args(args, num_samples, log=print_rank_0)


# Megatron then calls it on every rank: its own datasets wait for each other while they build.
setattr(datasets_provider, "is_distributed", True)  # noqa: B010


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: Model,
    return_schedule_plan: bool = False,
) -> tuple:
    """Run one microbatch of --dataset through `model`; return the losses and the loss function.

    return_schedule_plan: return the plan by which Megatron overlaps expert communication, which
    computes the losses later, in place of the losses.
    """
    args: Any = get_args()
    timers: Any = get_timers()
    tp_group: Any = parallel_state.get_tensor_model_parallel_group()
    cp_group: Any = parallel_state.get_context_parallel_group()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(
        data_iterator,
        attention_format(args),
        tp_group=tp_group,
        cp_group=cp_group,
    )
    timers("batch-generator").stop()
    padding: dict[str, Any] = {}
    if args.num_experts is not None and "quantile" not in str(args.moe_router_load_balancing_type):
        # Routers must not balance their load over padding; quantile balancing refuses to be told.
        padding["padding_mask"] = padding_of_stage(
            batch.padding_mask, model, args.sequence_parallel
        )
    run_model = model.build_schedule_plan if return_schedule_plan else model
    losses = run_model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        packed_seq_params=batch.packed_seq_params,
        loss_mask=batch.loss_mask,
        **padding,
    )
    return losses, partial(loss_func, batch.loss_mask, batch.num_tokens)


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    attention: AttentionFormat,
    *,
    tp_group: ProcessGroup,
    cp_group: ProcessGroup,
) -> Batch:
    """Return this rank's part of the next microbatch.

    Tensor-parallel rank 0 reads it and broadcasts it; context-parallel ranks then each take their
    chunks (the r-th and the r-th last of 2 cp, of each example in the thd format, else of each
    sequence). Every pipeline stage needs it, for the boundaries between examples.
    """
    data = {}
    if tp_group.rank() == 0:
        assert data_iterator is not None
        data = {key: value.long() for key, value in next(data_iterator).items() if key in _KEYS}
    batch = broadcast_data(_KEYS, data, torch.int64, tp_group=tp_group)
    cu_seqlens = batch["cu_seqlens"]
    # Before the cut, so that context-parallel ranks need not ask each other.
    num_tokens = batch["loss_mask"].sum()
    parts: dict[str, torch.Tensor] = {key: batch[key] for key in _SEQUENCE_KEYS}
    attention_mask, packed = None, None
    bounds = torch.tensor([0, parts["tokens"].shape[1]], device=cu_seqlens.device)
    if attention == "thd":
        parts = {key: value.reshape(1, -1) for key, value in parts.items()}
        bounds = merge_boundaries(cu_seqlens)
        packed = packed_params(bounds, cp_group)
    elif attention == "mask":
        attention_mask = block_diagonal_mask(cu_seqlens)
    if cp_group.size() > 1:
        index = chunk_positions(bounds, cp_group.size(), cp_group.rank())
        parts = {key: value.index_select(1, index) for key, value in parts.items()}
        if attention_mask is not None:
            attention_mask = attention_mask.index_select(2, index)
    parts["loss_mask"] = parts["loss_mask"].float()
    parts["padding_mask"] = parts["padding_mask"].bool()
    return Batch(
        **parts, num_tokens=num_tokens, attention_mask=attention_mask, packed_seq_params=packed
    )


def loss_func(
    loss_mask: torch.Tensor, num_tokens: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return this rank's part of the objective, what Megatron divides it by, and what it logs.

    loss_mask, losses: [b, s/cp]; num_tokens: [], of the microbatch on all context-parallel ranks.
    The objective, which is what is logged, does not depend on the parallel layout:

    * with --calculate-per-token-loss the mean over all trained tokens of the global batch. Megatron
      adds up losses and numbers of all data- and context-parallel ranks (finalize_model_grads).
    * without, the mean over the microbatches of the global batch of each one's mean over its
      trained tokens, 0 where it has none (forward_step_calc_loss). So it depends on
      --micro-batch-size; not on the data-parallel size, which deals out the same microbatches.
      Megatron averages over context-parallel ranks too (DistributedDataParallel): each gives cp
      times its sum, over the number of all.

    Where Megatron checks for NaN, a loss that is not finite stops the run.
    """
    loss = (losses.view(-1).float() * loss_mask.view(-1)).sum()
    args: Any = get_args()
    if args.check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda value: not torch.isfinite(value).all(),
            message="found a loss that is not finite",
            tolerance=0.0,
            fatal=True,
        )
    if args.calculate_per_token_loss:
        num_tokens = loss_mask.sum()
        # A batch without trained tokens is logged as 0; any number of them absorbs the smallest.
        weight = num_tokens.float().clamp(min=torch.finfo(torch.float32).tiny)
        report = torch.stack([loss.detach(), weight])
    else:
        loss = loss * parallel_state.get_context_parallel_world_size()
        mean = loss.detach() / num_tokens.clamp(min=1)
        report = torch.stack([mean, torch.ones_like(mean)])
    return loss, num_tokens.to(torch.int), {"lm loss": report}


def merge_boundaries(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the example boundaries of a microbatch laid end to end.

    cu_seqlens: [b, s + 1], each row from 0 and filled up with s. Returns [examples + 1] int64 from
    0 to b * s.
    """
    b, s = cu_seqlens.shape[0], cu_seqlens.shape[1] - 1
    starts = cu_seqlens + s * torch.arange(b, device=cu_seqlens.device)[:, None]
    return torch.unique(starts)


def packed_params(bounds: torch.Tensor, cp_group: ProcessGroup | None) -> PackedSeqParams:
    """Return the boundaries as TransformerEngine's attention and Mamba take them."""
    cu_seqlens = bounds.to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    group: Any = cp_group  # Megatron means None too
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cp_group=group,
        # Megatron numbers the tokens' examples by it, for Mamba's convolution and state.
        total_tokens=int(bounds[-1]),
    )


def block_diagonal_mask(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return [b, 1, s, s], true where a query must not look: later, or in another example."""
    s = cu_seqlens.shape[1] - 1
    positions = torch.arange(s, device=cu_seqlens.device).expand(len(cu_seqlens), s).contiguous()
    example = torch.searchsorted(cu_seqlens.contiguous(), positions, right=True)
    later = positions[:, :, None] < positions[:, None, :]
    return (later | (example[:, :, None] != example[:, None, :]))[:, None]


def chunk_positions(bounds: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions of a context-parallel rank: chunks r and 2 cp - 1 - r of each piece.

    bounds: [pieces + 1], every piece a multiple of 2 cp long. Source: the zigzag order of
    Megatron's get_batch_on_this_cp_rank and of TransformerEngine's thd_get_partitioned_indices.
    """
    starts, chunks = bounds[:-1], (bounds[1:] - bounds[:-1]) // (2 * cp_size)
    piece = torch.repeat_interleave(2 * chunks)
    chunk = chunks[piece]
    place = torch.arange(len(piece), device=bounds.device) - starts[piece] // cp_size
    late = (2 * cp_size - 2 - cp_rank) * chunk + place
    return starts[piece] + torch.where(place < chunk, cp_rank * chunk + place, late)


def padding_of_stage(padding: torch.Tensor, model: Model, sequence_parallel: bool) -> torch.Tensor:
    """Return the part of a mask [b, s/cp] that the routers of this stage meet.

    NOTE: the model shards it over the sequence with the embedding only, on the first stage.
    """
    if not sequence_parallel or get_attr_wrapped_model(model, "pre_process"):
        return padding
    tp_group: Any = parallel_state.get_tensor_model_parallel_group()
    return padding.chunk(tp_group.size(), dim=1)[tp_group.rank()].contiguous()
