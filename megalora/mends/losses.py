"""Losses that Megatron adds inside of the model, where shards of a microbatch hold unequal counts.

Loss masks and padding leave context- and sequence-parallel ranks with unequal numbers of tokens,
down to none. Megatron 0.19 divides by each rank's own number; what is mended divides by the number
of all ranks, as one process does.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import gpt_model
from megatron.core.models.hybrid import hybrid_model
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe import router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from megalora.replace import Patch

# Tokens of each expert, of this shard, of all shards.
Counts = tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | float]


def counted_over_context(process: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return process_mtp_loss with the mean of each depth over all context-parallel ranks.

    Megatron's schedule gives every rank the weight 1 / microbatches, and then either averages over
    cp ranks, or under calculate_per_token_loss divides by all trained tokens, which the mean of a
    microbatch must be multiplied by.
    """

    @functools.wraps(process)
    def counted(
        *args: object,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        compute_language_model_loss: Callable[..., torch.Tensor],
        config: TransformerConfig,
        cp_group: ProcessGroup | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if labels is not None and cp_group is not None and cp_group.size() > 1:
            mask = torch.ones_like(labels) if loss_mask is None else loss_mask
            own, of_all = _counts(mask, config.mtp_num_layers or 0, cp_group, packed_seq_params)
            weights = cp_group.size() * own[1:].clamp(min=1) / of_all[1:].clamp(min=1)
            compute_language_model_loss = _weighted(compute_language_model_loss, weights)
            if config.calculate_per_token_loss:
                changed: Any = copy.copy(config)
                changed.calculate_per_token_loss = False
                changed.mtp_loss_scaling_factor *= of_all[0] / cp_group.size()
                config = changed
        return process(
            *args,
            loss_mask=loss_mask,
            labels=labels,
            compute_language_model_loss=compute_language_model_loss,
            config=config,
            cp_group=cp_group,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    return counted


def _weighted(
    compute: Callable[..., torch.Tensor], weights: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """Weigh the losses of all depths, [num_depths], which Megatron divides by this rank's count."""
    of_next_depth = iter(weights)

    def weighted(*inputs: torch.Tensor) -> torch.Tensor:
        return compute(*inputs) * next(of_next_depth)

    return weighted


def _counts(
    mask: torch.Tensor,
    num_depths: int,
    cp_group: ProcessGroup,
    packed_seq_params: PackedSeqParams | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the trained tokens of each depth, [1 + num_depths], on this rank and on all ranks."""
    sums = [mask.sum()]
    roll: Any = multi_token_prediction.roll_tensor
    for _ in range(num_depths):
        mask, num_tokens = roll(mask, cp_group=cp_group, packed_seq_params=packed_seq_params)
        sums.append(num_tokens)
    own = torch.stack(sums).float()
    return own, _sum_over(own, cp_group)


def z_loss_over_shards(apply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return TopKRouter.apply_z_loss with the mean over the valid tokens of all shards.

    Megatron averages the means of the shards. Under calculate_per_token_loss it multiplies each by
    its own number of valid tokens, which is right.
    """

    @functools.wraps(apply)
    def apply_z_loss(
        self: router.TopKRouter, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        config, group = self.config, self.tp_cp_group
        coefficient = None if self.calculate_per_token_loss else config.moe_z_loss_coeff
        if padding_mask is None or group.size() == 1 or coefficient is None:
            return apply(self, logits, padding_mask=padding_mask)
        valid = (~padding_mask).sum().float()
        weight = group.size() * valid.clamp(min=1) / _sum_over(valid, group).clamp(min=1)
        self.config = copy.copy(config)
        # A tensor: Megatron only multiplies by it.
        self.config.moe_z_loss_coeff = coefficient * weight  # type: ignore[assignment]
        try:
            return apply(self, logits, padding_mask=padding_mask)
        finally:
            self.config = config

    return apply_z_loss


def mean_of_shards(count: Callable[..., Counts]) -> Callable[..., Counts]:
    """Return get_tokens_per_expert_and_token_count with the mean number of tokens of the shards.

    Under calculate_per_token_loss the routers multiply a balancing loss by the tokens of one shard
    times their number. NOTE: what Megatron returns is the sum of all, where padding is left out:
    it is counted after an all-reduce in place.
    """

    @functools.wraps(count)
    def counted(
        *, reduce_group: ProcessGroup, with_padding_mask: bool = False, **kwargs: object
    ) -> Counts:
        tokens_per_expert, own, total = count(
            reduce_group=reduce_group, with_padding_mask=with_padding_mask, **kwargs
        )
        if with_padding_mask:
            own = total / reduce_group.size()
        return tokens_per_expert, own, total

    return counted


def _sum_over(value: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


PATCHES = (
    *(
        Patch(
            module,
            "process_mtp_loss",
            ("loss_mask", "labels", "compute_language_model_loss", "config", "cp_group"),
            counted_over_context,
            "multi-token prediction divides by the tokens of one context-parallel rank",
        )
        for module in (gpt_model, hybrid_model)
    ),
    Patch(
        router,
        "get_tokens_per_expert_and_token_count",
        ("reduce_group", "with_padding_mask"),
        mean_of_shards,
        "balancing losses multiply by the tokens of one shard",
    ),
    Patch(
        router.TopKRouter,
        "apply_z_loss",
        ("logits", "padding_mask"),
        z_loss_over_shards,
        "the z loss averages means of shards with unequal counts",
    ),
)
