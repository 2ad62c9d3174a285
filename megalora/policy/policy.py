"""A Megatron model that gives log probabilities of answers, and is trained by a loss of them.

It runs in every layout, by Megatron's own forward-backward schedule. Imports Megatron, so
`megalora.launch.prepare_megatron` comes first.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import training
from torch import Tensor

from megalora.builder import set_enabled
from megalora.data.batch import Model
from megalora.policy.sequences import Sequences
from megalora.policy.shards import Metrics, forward, last_stage, length_of_all, summed, whole

# Whether a step was taken, the norm of its gradient, how many zeros are in it.
type Stepped = tuple[bool, float | None, int | None]


class HasSequences(Protocol):
    """A microbatch: sequences, and what its loss needs beside them."""

    @property
    def sequences(self) -> Sequences:
        """Return the sequences, [b, s]."""
        ...


@dataclass(frozen=True)
class Step:
    """An optimizer step: the gradient's norm, whether it was taken, and sums of its metrics."""

    grad_norm: float
    taken: bool
    metrics: dict[str, float]


class Policy:
    """Megatron's model, optimizer and schedule of learning rates.

    model: chunks in Megatron's DistributedDataParallel, with adapters. Raises ValueError for flags
    under which a loss of whole answers would be another one.
    """

    def __init__(
        self,
        model: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.config: Any = get_model_config(model[0])
        for name in ("calculate_per_token_loss", "overlap_moe_expert_parallel_comm"):
            if getattr(self.config, name):
                raise ValueError(
                    f"{name} is True: a loss of whole answers is neither divided by tokens nor "
                    f"planned ahead; leave --{name.replace('_', '-')} out"
                )
        # What Megatron's own loop sets before its first step.
        self.config.grad_scale_func = optimizer.scale_loss
        if self.config.finalize_model_grads_func is None:
            self.config.finalize_model_grads_func = finalize_model_grads
        wrapped = [chunk for chunk in model if isinstance(chunk, DistributedDataParallel)]
        if any(chunk.ddp_config.overlap_grad_reduce for chunk in wrapped):
            each = [chunk.no_sync for chunk in wrapped]
            self.config.no_sync_func = each if len(each) > 1 else each[0]

    @property
    def device(self) -> torch.device:
        """Return where the model is, and sequences have to be."""
        return next(self.model[0].parameters()).device

    def logprobs(self, parts: Sequence[Sequences]) -> list[Tensor]:
        """Return the log probability of each token of answers, without gradient.

        parts: microbatches of as many rows each, as many on every data-parallel rank. All ranks
        must call it. Returns fp32 [b, s] for each, on all ranks of a replica; 0 where no answer is.
        """
        modes = [chunk.training for chunk in self.model]
        for chunk in self.model:
            chunk.eval()
        try:
            with torch.no_grad():
                found = self._run(parts, lambda logprobs, _: logprobs, forward_only=True)
        finally:
            for chunk, mode in zip(self.model, modes, strict=True):
                chunk.train(mode)
        if not found:
            found = [torch.empty(part.tokens.shape, device=part.tokens.device) for part in parts]
        for logprobs in found:
            last_stage(logprobs)
        return found

    def step[Part: HasSequences](
        self, parts: Sequence[Part], loss: Callable[[Tensor, Part], tuple[Tensor, Metrics]]
    ) -> Step:
        """Take an optimizer step on the sum of the losses of microbatches.

        The gradient is the mean over data-parallel ranks. All ranks must call it, with as many
        microbatches of as many rows each. loss: called with the log probabilities [b, s] of a
        microbatch's answers (0 where none is), whole in every layout, and the microbatch; returns
        a scalar and metrics, which are summed over microbatches and data-parallel ranks. It is
        called on the last pipeline stage only. Raises ValueError for a loss that is not finite.
        """
        for chunk in self.model:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def of_part(logprobs: Tensor, index: int) -> tuple[Tensor, Metrics]:
            value, metrics = loss(logprobs, parts[index])
            if not value.isfinite():
                raise ValueError(f"the loss is {value.item()}: lower --lr")
            # The schedule divides by the number of microbatches.
            return value * len(parts), metrics

        found = self._run([part.sequences for part in parts], of_part, forward_only=False)
        taken, grad_norm, _ = cast("Stepped", self.optimizer.step())
        gather_parameters(self.model, self.optimizer)
        return Step(float(grad_norm or 0), bool(taken), summed(found))

    def _run(
        self,
        parts: Sequence[Sequences],
        loss: Callable[[Tensor, int], object],
        *,
        forward_only: bool,
    ) -> list:
        """Run the schedule; return, on the last stage, what `loss` gave for each microbatch.

        loss: given log probabilities [b, s] and the number of the microbatch.
        """
        length = length_of_all(parts, self.config)
        rows = {len(part.tokens) for part in parts}
        if len(rows) != 1:
            raise ValueError(f"microbatches have {sorted(rows)} rows: give each as many")

        def run_one(indices: Iterator[int], model: Model) -> tuple:
            index = next(indices)
            output, own = forward(model, self.config, parts[index].filled(length))

            def of_output(losses: Tensor, non_loss_data: bool = False) -> object:
                del non_loss_data
                return loss(whole(losses, parts[index], own), index)

            return output, of_output

        return get_forward_backward_func()(
            forward_step_func=run_one,
            data_iterator=[iter(range(len(parts))) for _ in self.model],
            model=self.model,
            num_microbatches=len(parts),
            seq_length=length,
            micro_batch_size=rows.pop(),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Be the base: the same model with its adapters switched off."""
        set_enabled(self.model, False)
        try:
            yield
        finally:
            set_enabled(self.model, True)

    def save(self, iteration: int) -> None:
        """Write the adapters and their optimizer to --save."""
        parts = (self.model, self.optimizer, self.scheduler)
        # By its module: `LoRARun` has put its own around Megatron's.
        training.save_checkpoint(iteration, *parts, num_floating_point_operations_so_far=0)
        # Of --async-save, which Megatron's own loop finishes in a later iteration.
        training.maybe_finalize_async_save(blocking=True)


def gather_parameters(model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> None:
    """Have the new parameters on all ranks, where Megatron gathers them in the next forward.

    What is saved, exported, measured or handed over before it would be the old ones.
    """
    wrapped = [chunk for chunk in model if isinstance(chunk, DistributedDataParallel)]
    if any(chunk.ddp_config.overlap_param_gather for chunk in wrapped):
        training.force_param_sync(wrapped, optimizer=optimizer)
