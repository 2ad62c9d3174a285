"""The ranks that hold one replica of a model: one of them speaks, the others are told."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Replica:
    """This rank's place among the ranks that hold the same model and the same data.

    index: the data-parallel rank, the same on all of them. speaks: this rank is tensor-parallel
    rank 0 of the first pipeline stage, and the first of its context-parallel ranks. groups: over
    which, one after the other, what the speaker has reaches all; the first rank of each has it by
    then. device: of the tensors that travel.
    """

    index: int
    speaks: bool
    groups: Sequence[ProcessGroup]
    device: torch.device

    def share(self, numbers: torch.Tensor | None) -> torch.Tensor:
        """Return the numbers of the speaker, fp64 [n], on all ranks; all must call it.

        numbers: what the speaker has; of others nothing is read. Tensors travel, not objects.
        """
        held = torch.empty(0, dtype=torch.float64) if numbers is None else numbers
        held = held.to(self.device)
        for group in self.groups:
            first = dist.get_process_group_ranks(group)[0]
            count = torch.tensor([held.numel()], device=self.device)
            dist.broadcast(count, first, group=group)
            if dist.get_rank() != first:
                held = torch.empty(int(count), dtype=torch.float64, device=self.device)
            dist.broadcast(held, first, group=group)
        return held.cpu()
