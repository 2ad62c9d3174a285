"""Train tiny models for a few steps with Megatron's own schedules, DDP and optimizer."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megalora.data.batch import forward_step
from tests.dist.support.answers import NUM_SEQUENCES, Answers, Microbatch
from tests.dist.support.layouts import Layout
from tests.dist.support.models import SEQ_LENGTH, VOCAB_SIZE

NUM_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """How to train; `one_rank` gives every data-parallel rank the whole batch.

    With `one_rank` the averages over data-parallel ranks are those of one rank alone, which makes
    the unsharded reference of a layout available in its own processes. `cu_seqlens` packs the
    tokens of each sequence into shorter ones. `answers` trains on these by the example's own route
    instead of on all of random tokens. `loss_scale` is where that of fp16 starts, which Megatron
    halves after a step that overflows. `on_gradients` is called with the step's number when the
    gradients are complete and the optimizer has not yet run.
    """

    one_rank: bool = False
    micro_batch_size: int = 1
    answers: Answers | None = None
    num_steps: int = NUM_STEPS
    lr: float = 1e-2
    adam_eps: float = 1e-8
    loss_scale: float = 1.0
    distributed_optimizer: bool = False
    overlap: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    on_gradients: Callable[[int], None] | None = None

    def rows(self, data_rank: int, data_ranks: int) -> list[int]:
        """Return which sequences of a batch a data-parallel rank has, in its order."""
        numbers = torch.arange(NUM_SEQUENCES)
        if self.answers is None:
            return numbers.chunk(data_ranks)[data_rank].tolist()
        dealt = numbers.view(-1, data_ranks, self.answers.micro_batch_size)
        return dealt[:, data_rank].flatten().tolist()

    def whole_batch(self, step: int) -> list[Microbatch]:
        """Return the microbatches of a step as one process has them."""
        if self.answers is not None:
            return self.answers.microbatches(step)
        positions = torch.arange(SEQ_LENGTH).expand(self.micro_batch_size, -1)
        return [
            Microbatch(tokens[:, :-1], tokens[:, 1:], positions)
            for tokens in _tokens(step).split(self.micro_batch_size)
        ]


class Trainer:
    """Wrapped model chunks and their optimizer, which is Megatron's for `run` unless it is given.

    optimizer: makes the optimizer of the wrapped chunks.
    """

    def __init__(
        self,
        chunks: list[GPTModel],
        layout: Layout,
        run: Run,
        optimizer: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        config = get_model_config(chunks[0])
        self.layout, self.run = layout, run
        self.models: list[Any] = _wrap(chunks, run)
        if optimizer is None:
            self.optimizer = get_megatron_optimizer(_optimizer_config(config, run), self.models)
        else:
            self.optimizer = optimizer(self.models)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def step(self, number: int) -> tuple[float, float]:
        """Do a training step on its own tokens; return the mean loss and the gradient norm.

        The same loss comes back on every rank; the norm of a step that was skipped is infinite.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = _forward_backward(self.models, self.layout, self.run, number)
        if self.run.on_gradients is not None:
            self.run.on_gradients(number)
        stepped: Any = self.optimizer.step()
        return loss, float("inf") if stepped[1] is None else float(stepped[1])


def train(chunks: list[GPTModel], layout: Layout, run: Run | None = None) -> torch.Tensor:
    """Train on fixed random tokens; return [num_steps, 2]: mean loss and gradient norm by step.

    The same numbers come back on every rank; the norm of a step that was skipped is infinite.
    """
    run = run or Run()
    trainer = Trainer(chunks, layout, run)
    if run.overlap:
        syncs = [model.no_sync for model in trainer.models]
        get_model_config(chunks[0]).no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    history = [trainer.step(number) for number in range(run.num_steps)]
    if run.overlap and run.distributed_optimizer:
        # The gathering of the last step's parameters would wait for the next forward pass.
        for model in trainer.models:
            model.start_param_sync(force_sync=True)
    return torch.tensor(history, dtype=torch.float64)


def _wrap(chunks: list[GPTModel], run: Run) -> list[DistributedDataParallel]:
    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=run.distributed_optimizer,
        overlap_grad_reduce=run.overlap,
        overlap_param_gather=run.overlap and run.distributed_optimizer,
        # Several buckets, so that there is something to overlap.
        bucket_size=5000 if run.overlap else None,
        grad_reduce_in_fp32=True,
    )
    is_half = config.bf16 or config.fp16
    inner = [Float16Module(config, c) for c in chunks] if is_half else chunks
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(inner)
    ]


def _optimizer_config(config: Any, run: Run) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=run.lr,
        adam_eps=run.adam_eps,
        weight_decay=0.0,
        clip_grad=1.0,
        bf16=config.bf16,
        fp16=config.fp16,
        initial_loss_scale=run.loss_scale,
        hysteresis=1,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=run.distributed_optimizer,
        overlap_param_gather=run.overlap and run.distributed_optimizer,
    )


def _forward_backward(models: list[Any], layout: Layout, run: Run, step: int) -> float:
    data_ranks = 1 if run.one_rank else parallel_state.get_data_parallel_world_size()
    answers, size = run.answers, run.micro_batch_size
    if answers is not None:
        size = answers.micro_batch_size
    virtual = len(models) > 1
    with contextlib.nullcontext() if answers is None else answers.as_args(models[0].config):
        iterators: list[Any] = [
            _microbatches(layout, run, step) if answers is None else answers.loader(step)
            for _ in models
        ]
        losses: list[Any] = get_forward_backward_func()(
            forward_step_func=_Forward(layout, run) if answers is None else forward_step,
            data_iterator=iterators if virtual else iterators[0],
            model=models if virtual else models[0],
            num_microbatches=NUM_SEQUENCES // size // data_ranks,
            seq_length=SEQ_LENGTH,
            micro_batch_size=size,
            forward_only=False,
        )
    # Only the last pipeline stage has losses.
    reports = [report["lm loss"].double() for report in losses]
    total = torch.stack(reports).sum(0) if reports else torch.zeros(2, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(VOCAB_SIZE, (NUM_SEQUENCES, SEQ_LENGTH + 1), generator=generator)


def _microbatches(layout: Layout, run: Run, step: int) -> Iterator[torch.Tensor]:
    """Yield this data-parallel rank's tokens, [micro_batch_size, SEQ_LENGTH + 1]."""
    tokens = _tokens(step)
    if not run.one_rank:
        tokens = tokens.chunk(layout.dp)[parallel_state.get_data_parallel_rank()]
    yield from tokens.split(run.micro_batch_size)


class _Forward:
    """Megatron's forward_step_func."""

    def __init__(self, layout: Layout, run: Run) -> None:
        self.run = run
        self.cut = context_parallel_cut(layout, run)

    def __call__(
        self, iterator: Iterator[torch.Tensor], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Any]:
        tokens = next(iterator)
        positions = torch.arange(SEQ_LENGTH).expand(tokens.shape[0], -1)
        inputs, labels, positions = (
            x[:, self.cut] for x in (tokens[:, :-1], tokens[:, 1:], positions)
        )
        run_model = model.build_schedule_plan if return_schedule_plan else model
        output = run_model(
            inputs, positions, None, labels=labels, packed_seq_params=packed(self.run.cu_seqlens)
        )
        return output, _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the sum of the token losses, the number of tokens, and both to report."""
    total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
    report = torch.stack([total.detach().double(), count.double()])
    return total, count, {"lm loss": report}


def context_parallel_cut(layout: Layout, run: Run) -> torch.Tensor:
    """Return the positions of this context-parallel rank: two chunks of each packed sequence."""
    bounds = run.cu_seqlens or (0, SEQ_LENGTH)
    rank = parallel_state.get_context_parallel_rank()
    positions = []
    for start, end in itertools.pairwise(bounds):
        chunks = torch.arange(start, end).chunk(2 * layout.cp)
        positions += [chunks[rank], chunks[2 * layout.cp - 1 - rank]]
    return torch.cat(positions)


def packed(cu_seqlens: tuple[int, ...] | None) -> PackedSeqParams | None:
    """Return Megatron's description of sequences that end where the next starts, or None."""
    if cu_seqlens is None:
        return None
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    longest = int(starts.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
