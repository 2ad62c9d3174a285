"""What attention sends and holds where the tokens of a sequence lie on several ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.plan.engine.base import gather, reduce_scatter

Attend = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Context:
    """Ranks that share sequences, and how: `p2p`, `all_gather`, `a2a`, or `a2a+p2p`.

    outer, inner: the groups that pass keys on, and that exchange heads for tokens.
    """

    kind: str
    outer: ProcessGroup | None
    inner: ProcessGroup | None

    @property
    def size(self) -> int:
        """Return over how many ranks a sequence is cut."""
        sizes = [group.size() for group in (self.outer, self.inner) if group is not None]
        return sizes[0] * sizes[1] if len(sizes) == 2 else sizes[0]

    def exchange(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Give heads away for tokens, or tokens for heads: as much comes as goes."""
        if self.inner is None or self.inner.size() == 1:
            return list(tensors)
        outs = []
        for tensor in tensors:
            out = torch.empty_like(tensor)
            dist.all_to_all_single(out, tensor.contiguous(), group=self.inner)
            outs.append(out)
        return outs

    def gather_keys(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return keys and values, or their gradients, as a kernel sees them at its largest.

        p2p: those of every rank pass by, in two buffers.
        """
        if self.outer is None or self.outer.size() == 1:
            return list(tensors)
        if self.kind == "all_gather":
            return [gather(tensor, self.outer) for tensor in tensors]
        buffers = [torch.cat([tensor.flatten() for tensor in tensors])]
        for _ in range(self.outer.size() - 1):
            buffers = [buffers[-1], _pass_on(buffers[-1], self.outer)]
        return buffers

    def scatter_gradients(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's gradients of keys and values, which every rank has a part of."""
        if self.outer is None or self.outer.size() == 1:
            return list(tensors)
        if self.kind == "all_gather":
            size = self.outer.size()
            whole = [t.new_empty(size * t.shape[0], *t.shape[1:]) for t in tensors]
            return [reduce_scatter(t, self.outer) for t in whole]
        passing = torch.cat([tensor.flatten() for tensor in tensors])
        for _ in range(self.outer.size() - 1):
            passing = _pass_on(passing, self.outer)
        return list(tensors)


def _pass_on(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Send a tensor to the next rank of a ring; return what comes from the one before."""
    out, size = torch.empty_like(tensor), group.size()
    ahead, behind = (group.rank() + 1) % size, (group.rank() - 1) % size
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=ahead),
            dist.P2POp(dist.irecv, out, group=group, group_peer=behind),
        ]
    )
    for work in works:
        work.wait()
    return out
