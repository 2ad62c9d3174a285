"""The reinforcement learning loss of "LoRA Without Regret", for any Megatron model.

Sample groups of answers to each prompt with the current adapters, keep the sampler's log
probabilities, and train on

    -sum_t (p_learner / p_sampler)(t) * advantage,    advantage = reward - mean of its group

without division by the group's standard deviation and without clipping of the ratio.
"""

import torch
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
    learner_logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Return the loss summed over the sampled tokens given; divide by what the run counts.

    Under context parallelism: by the number on all ranks, as `megalora.data.batch.loss_func` does.

    learner_logprobs: [s, b], of the sampled tokens, with gradient. sampler_logprobs: [s, b], of the
    same tokens when they were sampled; its gradient is not used. advantages: [b], one for each
    episode. mask: [s, b], nonzero on sampled tokens; elsewhere both log probabilities may be
    anything, infinities included.
    """
    sampled = mask != 0
    # NOTE: masked before exp: an overflow there would turn into a NaN gradient behind a zero.
    log_ratio = (learner_logprobs - sampler_logprobs.detach()).masked_fill(~sampled, 0)
    return -(log_ratio.exp() * advantages * sampled).sum()


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
