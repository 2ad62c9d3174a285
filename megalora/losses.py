"""Losses of reinforcement learning and of preferences, for any Megatron model.

"LoRA Without Regret" samples groups of answers to each prompt with the current adapters, keeps the
sampler's log probabilities, and trains on

    -sum_t (p_learner / p_sampler)(t) * advantage,    advantage = reward - mean of its group

without division by the group's standard deviation and without clipping of the ratio, which is the
default here. All losses are sums over what they are given, to be divided by what the run counts.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Subtract from each reward the mean of its group.

    rewards: [num_groups * group_size], the answers to one prompt side by side. Raises ValueError
    where they are not whole groups, or where a group is a single answer, whose advantage would
    always be zero.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}: it must be at least 2, a single answer has no advantage"
        )
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}, not whole groups of {group_size}: "
            "give one reward for each answer, the answers to one prompt side by side"
        )
    grouped = rewards.view(-1, group_size)
    return (grouped - grouped.mean(dim=1, keepdim=True)).flatten()


def policy_gradient_loss(
    learner_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """Return the loss summed over the sampled tokens given; divide by what the run counts.

    Under context parallelism: by the number on all ranks, as `megalora.data.batch.loss_func` does.

    learner_logprobs: [s, b], of the sampled tokens, with gradient. sampler_logprobs: [s, b], of the
    same tokens when they were sampled; its gradient is not used. advantages: [b], one for each
    episode. mask: [s, b], nonzero on sampled tokens; elsewhere both log probabilities may be
    anything, infinities included.

    clip_low, clip_high: what the ratio may win below 1 - clip_low and above 1 + clip_high, which is
    nothing: the smaller of both objectives counts, as in PPO (Schulman et al., 2017, eq. 7), with
    bounds of their own as in DAPO (Yu et al., 2025, eq. 10). None: no bound on that side. Raises
    ValueError for a bound that leaves no ratio.
    """
    log_ratio = _masked_difference(learner_logprobs, sampler_logprobs.detach(), mask)
    bounded = _bounded(log_ratio, advantages, clip_low, clip_high)
    return -(bounded.exp() * advantages * (mask != 0)).sum()


def kl_loss(
    learner_logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    *,
    sampler_logprobs: Tensor | None = None,
) -> Tensor:
    """Return the divergence KL(learner || reference), estimated and summed over the tokens given.

    Of each token it is exp(d) - d - 1 with d = log p_reference - log p_learner: never negative, and
    unbiased on tokens that the learner sampled. Source: k3 of J. Schulman, "Approximating KL
    Divergence", 2020. The shapes are those of `policy_gradient_loss`; reference_logprobs: [s, b],
    without gradient, such as the base's (adapters off).

    sampler_logprobs: weigh each token by p_learner / p_sampler, gradient included, by which value
    and gradient are unbiased whoever sampled. Source: DeepSeek-V3.2, 2025. Without it the gradient
    is that of k3 alone, which is not the divergence's even where the learner samples.
    """
    difference = _masked_difference(reference_logprobs.detach(), learner_logprobs, mask)
    each = torch.expm1(difference) - difference
    if sampler_logprobs is not None:
        each = each * _masked_difference(learner_logprobs, sampler_logprobs.detach(), mask).exp()
    return each.sum()


def num_clipped(
    learner_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """Return on how many tokens `policy_gradient_loss` of the same arguments has no gradient."""
    with torch.no_grad():
        log_ratio = _masked_difference(learner_logprobs, sampler_logprobs, mask)
        return (_bounded(log_ratio, advantages, clip_low, clip_high) != log_ratio).sum()


def sequence_logprobs(
    logprobs: Tensor, mask: Tensor, *, cp_group: ProcessGroup | None = None
) -> Tensor:
    """Return the log probability of each whole answer, [b].

    logprobs: [s, b], of tokens; mask: [s, b], nonzero on those of the answer, elsewhere logprobs
    may be anything. cp_group: the context-parallel group, whose ranks have [s/cp, b] each. Forward
    all-reduces [b] over it, so that each rank has the whole sum; backward gives each rank the
    gradient of its own tokens, without a collective. All ranks then have the same loss, and the
    gradient is the sum of theirs: where Megatron averages over context-parallel ranks
    (DistributedDataParallel without --calculate-per-token-loss), multiply the loss by cp.
    """
    own = logprobs.masked_fill(mask == 0, 0).sum(0)
    if cp_group is None or cp_group.size() == 1:
        return own
    return _SummedOverRanks.apply(own, cp_group)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss of Direct Preference Optimization, summed over the pairs given.

    Each argument is [b], log probabilities of whole answers (see `sequence_logprobs`); those of the
    reference get no gradient. With the margin m = beta * (log(p / p_reference)(chosen) -
    log(p / p_reference)(rejected)) a pair's loss is -log sigmoid(m). label_smoothing, e: the share
    of pairs labelled the wrong way round, (1 - e) * -log sigmoid(m) + e * -log sigmoid(-m).
    Sources: Rafailov et al., 2023, eq. 7; E. Mitchell, "A note on DPO with noisy preferences",
    2023. Raises ValueError for a beta or a label_smoothing that teaches nothing.
    """
    check_dpo(beta, label_smoothing)
    chosen = beta * (chosen_logprobs - reference_chosen_logprobs.detach())
    rejected = beta * (rejected_logprobs - reference_rejected_logprobs.detach())
    margin = chosen - rejected
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * right + label_smoothing * wrong).sum()


def check_dpo(beta: float, label_smoothing: float) -> None:
    """Raise ValueError for a beta or a label_smoothing that teaches nothing."""
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}: it must be above 0, such as 0.1")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}: the share of pairs labelled the wrong way "
            "round must be at least 0 and below 0.5"
        )


def dpo_metrics(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    *,
    beta: float,
) -> dict[str, Tensor]:
    """Return what `dpo_loss` of the same arguments makes of the pairs, each a sum over them.

    Under TRL's names: the implicit rewards beta * log(p / p_reference) of chosen and rejected
    answers, the margin between them, and in how many pairs the chosen one has the higher.
    """
    with torch.no_grad():
        chosen = beta * (chosen_logprobs - reference_chosen_logprobs)
        rejected = beta * (rejected_logprobs - reference_rejected_logprobs)
        return {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype).sum(),
        }


def vocab_parallel_logprobs(
    logits: Tensor, tokens: Tensor, *, tp_group: ProcessGroup | None = None
) -> Tensor:
    """Return the log probability of each token, fp32 [s, b].

    logits: [s, b, v/tp], as Megatron's output layer gives them with parallel output.
    tokens: [s, b] int64, the token that each position predicts. tp_group: the group that v is split
    over, default Megatron's tensor-parallel one. Forward all-reduces three [s, b] tensors over the
    group; backward needs no collective.
    """
    # Imported late: `megalora.cpu.install` has to come before megatron, and the rest needs none.
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    # NOTE: Megatron's cross entropy works in place on what `.float()` returns, which for fp32
    # logits is the caller's own tensor.
    own = logits.clone() if logits.dtype == torch.float32 else logits
    return -vocab_parallel_cross_entropy(own, tokens, tp_group=tp_group)


class _SummedOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group: forward all-reduces, backward passes the gradient on."""

    @staticmethod
    def forward(ctx: object, own: Tensor, group: ProcessGroup) -> Tensor:
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _masked_difference(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Return one - other where the mask is nonzero, and 0 elsewhere."""
    # NOTE: masked before exp: an overflow there would turn into a NaN gradient behind a zero.
    return (one - other).masked_fill(mask == 0, 0)


def _bounded(
    log_ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> Tensor:
    """Return the logarithm of the ratio, no further than it may win; without gradient there.

    NOTE: bounded before exp: beyond the bound an overflow would turn into a NaN gradient.
    """
    if clip_low is not None and not 0 <= clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}: it must be at least 0 and below 1, such as 0.2")
    if clip_high is not None and not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}: it must be at least 0, such as 0.2")
    if clip_high is not None:
        below = log_ratio.clamp(max=math.log1p(clip_high))
        log_ratio = torch.where(advantages > 0, below, log_ratio)
    if clip_low is not None:
        above = log_ratio.clamp(min=math.log1p(-clip_low))
        log_ratio = torch.where(advantages < 0, above, log_ratio)
    return log_ratio
