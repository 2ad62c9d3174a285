"""The example's own route: its dataset, loader, forward step and loss, trained on answers only.

The rows leave ranks without a trained token: of two context-parallel ranks either one or both, of
two data-parallel ranks one, and a whole microbatch.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.training.datasets import data_samplers

from megalora.data import PackedDataset
from megalora.data.examples import Examples
from tests.dist.support.route import as_args, route_args

NUM_SEQUENCES, SEQ_LENGTH = 4, 16
NUM_ROWS = 5 * NUM_SEQUENCES
# Of each example how many positions it takes, and which of them are trained.
PADDED = [(16, range(9, 12)), (16, ()), (9, range(1, 4)), (14, range(6, 14))]
PACKED = [(10, range(8, 10)), (6, range(2, 3)), (16, ()), (5, range(1, 5)), (11, ()), (14, [2, 13])]


class Microbatch(NamedTuple):
    """Whole sequences: [b, s], attention_mask [b, 1, s, s] or None for a causal one."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    attention_mask: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """How to train on answers: by which mean, and with rows that hold one example or several."""

    per_token: bool = False
    attention: Literal["padded", "mask"] = "padded"
    micro_batch_size: int = 1

    def __str__(self) -> str:
        """Name the mean and the rows, as in `packed answers by token`."""
        rows = "packed answers" if self.attention == "mask" else "answers"
        size = f" in pairs of {self.micro_batch_size}" if self.micro_batch_size > 1 else ""
        return f"{rows}{size} by {'token' if self.per_token else 'microbatch'}"

    @functools.cached_property
    def dataset(self) -> PackedDataset:
        """The rows of all steps, in their order."""
        kinds = PADDED if self.attention == "padded" else PACKED
        generator = np.random.default_rng(0)
        ids, trained = [], []
        for number in range(2 * NUM_ROWS):
            length, answer = kinds[number % len(kinds)]
            ids.append(generator.integers(1, 64, length + 1, np.int32))
            trained.append(np.isin(np.arange(-1, length), list(answer)))
        offsets = np.cumsum([0, *map(len, ids)])
        examples = Examples(np.concatenate(ids), np.concatenate(trained), offsets, 0, 0)
        packing = self.attention == "mask"
        return PackedDataset(
            examples, SEQ_LENGTH, 0, packing=packing, num_samples=NUM_ROWS, shuffle=False
        )

    def microbatches(self, step: int) -> list[Microbatch]:
        """Return the batch of a step as one process would see it, by other code than the route."""
        rows = range(step * NUM_SEQUENCES, (step + 1) * NUM_SEQUENCES)
        found = []
        for first in rows[:: self.micro_batch_size]:
            samples = [self.dataset[row] for row in range(first, first + self.micro_batch_size)]
            stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
            example = (stacked["position_ids"] == 0).cumsum(1)
            hidden = torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).triu(1)
            hidden = (hidden | (example[:, :, None] != example[:, None, :]))[:, None]
            found.append(
                Microbatch(
                    stacked["tokens"],
                    stacked["labels"],
                    stacked["position_ids"],
                    hidden if self.attention == "mask" else None,
                    stacked["loss_mask"],
                    stacked["padding_mask"],
                )
            )
        return found

    def loader(self, step: int) -> Iterator[dict[str, torch.Tensor]] | None:
        """Return Megatron's loader from a step on, where this rank reads data."""
        if parallel_state.get_tensor_model_parallel_rank():
            return None
        loader: Any = data_samplers.build_pretraining_data_loader(
            self.dataset, step * NUM_SEQUENCES
        )
        return iter(loader)

    @contextlib.contextmanager
    def as_args(self, config: Any) -> Iterator[None]:
        """Give the route the arguments of a run."""
        args = route_args(
            micro_batch_size=self.micro_batch_size,
            global_batch_size=NUM_SEQUENCES,
            calculate_per_token_loss=self.per_token,
            num_experts=config.num_moe_experts,
            moe_router_load_balancing_type=config.moe_router_load_balancing_type,
            sequence_parallel=config.sequence_parallel,
        )
        with as_args(args, self.attention):
            yield
