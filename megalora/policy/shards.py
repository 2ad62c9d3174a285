"""Sequences cut for a rank, and log probabilities whole again."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.data.batch import Model, chunk_positions, padding_of_stage
from megalora.policy.sequences import Sequences

type Metrics = Mapping[str, Tensor]


def length_of_all(parts: Sequence[Sequences], config: TransformerConfig) -> int:
    """Return the length to fill all microbatches up to: one on all ranks, which divides evenly.

    Pipeline stages and dispatchers of experts send tensors of one shape. All ranks must call it.
    """
    longest = max(int(part.lengths.max()) for part in parts)
    device = parts[0].tokens.device
    agreed = torch.tensor(longest, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    cp, tp = config.context_parallel_size, config.tensor_model_parallel_size
    multiple = math.lcm(2 * cp, cp * tp if config.sequence_parallel else 1)
    return -(-int(agreed) // multiple) * multiple


def forward(model: Model, config: TransformerConfig, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Run one stage of the model; return its output, and this rank's positions [s/cp].

    The last stage's output is the negative log probability of the token after each of them,
    [b, s/cp], by Megatron's own cross entropy: over the unpadded vocabulary, wherever it lies.
    """
    group = _context()
    length = sequences.tokens.shape[1]
    bounds = torch.tensor([0, length], device=sequences.tokens.device)
    own = chunk_positions(bounds, group.size(), group.rank())
    # The last one's label is not used: nothing is behind it.
    labels = sequences.tokens.roll(-1, dims=1)
    cut = [t.index_select(1, own) for t in (sequences.tokens, labels, sequences.padding)]
    tokens, labels, padding = cut
    named: dict[str, Tensor] = {}
    if config.num_moe_experts and "quantile" not in str(config.moe_router_load_balancing_type):
        named["padding_mask"] = padding_of_stage(padding, model, config.sequence_parallel)
    if config.mtp_num_layers:
        trained = sequences.answers.roll(-1, dims=1).float()
        trained[:, -1] = 0
        named["loss_mask"] = trained.index_select(1, own)
    output = model(tokens, own.expand_as(tokens), None, labels=labels, **named)
    return output, own


def whole(losses: Tensor, sequences: Sequences, own: Tensor) -> Tensor:
    """Return log probabilities [b, s] of the tokens of answers, 0 elsewhere, from a rank's losses.

    losses: [b, s'/cp] of the tokens after positions `own`, of sequences that were filled up to s'.
    Its gradient reaches this rank's own: the sum over the context-parallel ranks is the gradient.
    """
    group = _context()
    logprobs = -losses.float()
    if group.size() > 1:
        others = [torch.empty_like(logprobs) for _ in range(group.size())]
        dist.all_gather(others, logprobs.detach().contiguous(), group=group)
        bounds = torch.tensor([0, losses.shape[1] * group.size()], device=own.device)
        places = [chunk_positions(bounds, group.size(), rank) for rank in range(group.size())]
        gathered = torch.cat(others, dim=1).index_select(1, torch.cat(places).argsort())
        logprobs = gathered.index_copy(1, own, logprobs)
    length = sequences.tokens.shape[1]
    # Filled up, or cut: of what lies behind the longest row nothing is asked.
    after = torch.nn.functional.pad(logprobs, (1, length - 1 - logprobs.shape[1]))
    return torch.where(sequences.answers, after, 0)


def last_stage(values: Tensor) -> Tensor:
    """Return the last pipeline stage's values on all stages, in place."""
    stages = _stages()
    if stages.size() > 1:
        dist.broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
    return values


def summed(each: Sequence[Metrics]) -> dict[str, float]:
    """Return the sums of metrics over microbatches and data-parallel ranks, on all ranks.

    each: of every microbatch, on the last pipeline stage; elsewhere nothing.
    """
    names = [list(each[0]) if each else []]
    stages = _stages()
    if stages.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(names, last, group=stages)
    values = [sum(float(metrics[name]) for metrics in each) for name in names[0]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if each:
        dist.all_reduce(sums, group=_replicas())
    return dict(zip(names[0], last_stage(sums).tolist(), strict=True))


def _context() -> ProcessGroup:
    return cast("ProcessGroup", parallel_state.get_context_parallel_group())


def _replicas() -> ProcessGroup:
    return cast("ProcessGroup", parallel_state.get_data_parallel_group())


def _stages() -> ProcessGroup:
    return cast("ProcessGroup", parallel_state.get_pipeline_model_parallel_group())
