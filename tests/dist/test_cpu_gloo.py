"""What megalora.cpu adds to gloo does what NCCL does."""

import torch
import torch.distributed as dist

from tests.dist.layouts import Layout, over

# More than the sockets between two processes hold, so that sending has to wait for the receiver.
LARGE = 4_000_000


@over(Layout(dp=2))
def test_a_sent_tensor_may_be_overwritten_at_once(layout: Layout) -> None:
    if dist.get_rank() == 0:
        tensor = torch.ones(LARGE)
        request = dist.isend(tensor, dst=1)
        tensor.zero_()
        dist.barrier()
        assert request is not None
        request.wait()
    else:
        dist.barrier()
        received = torch.empty(LARGE)
        dist.recv(received, src=0)
        assert torch.equal(received, torch.ones(LARGE))


@over(Layout(dp=2))
def test_the_average_of_a_collective_is_over_the_group(layout: Layout) -> None:
    mine = torch.full((2,), float(dist.get_rank()))
    dist.all_reduce(mine, op=dist.ReduceOp.AVG)
    assert mine.tolist() == [0.5, 0.5]
    part = torch.empty(1)
    whole = torch.tensor([1.0, 3.0]) * (dist.get_rank() + 1)
    dist.reduce_scatter_tensor(part, whole, op=dist.ReduceOp.AVG)
    assert part.item() == [1.5, 4.5][dist.get_rank()]


@over(Layout(dp=2))
def test_shards_of_unequal_length_are_gathered_and_scattered(layout: Layout) -> None:
    rank, lengths = dist.get_rank(), [1, 3]
    shards = [torch.empty(length, 2) for length in lengths]
    dist.all_gather(shards, torch.full((lengths[rank], 2), float(rank + 1)))
    assert [shard.unique().tolist() for shard in shards] == [[1.0], [2.0]]
    mine = torch.empty(lengths[rank], 2)
    dist.reduce_scatter(mine, shards)
    assert torch.equal(mine, 2 * shards[rank])
