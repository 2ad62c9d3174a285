"""What megalora.cpu adds to gloo does what NCCL does."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist

from tests.dist.support.layouts import Layout, over

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


def total(group: dist.ProcessGroup) -> float:
    """Return the sum of the members' ranks, summed by the group itself."""
    mine = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(mine, group=group)
    return mine.item()


@over(Layout(dp=4))
def test_the_same_ranks_share_a_group_that_none_of_them_destroys(layout: Layout) -> None:
    one, other = dist.new_group([0, 2]), dist.new_group([0, 2])
    assert one is other
    if dist.get_rank() in (0, 2):
        dist.destroy_process_group(one)
        assert total(other) == 2
    # A rank that is no member must agree with the members on how many groups there are.
    third = dist.new_group([1, 2, 3])
    if dist.get_rank() > 0:
        assert total(third) == 6


@over(Layout(dp=2))
def test_other_ranks_or_another_timeout_have_a_group_of_their_own(layout: Layout) -> None:
    both = dist.new_group([0, 1])
    patient = dist.new_group([0, 1], timeout=datetime.timedelta(hours=3))
    alone = [dist.new_group([rank]) for rank in range(2)]
    assert both is not patient
    assert both is not dist.group.WORLD
    assert [total(both), total(patient), total(alone[dist.get_rank()])] == [1, 1, dist.get_rank()]


@pytest.mark.last
@over(Layout(), Layout(dp=2), Layout(dp=4))
def test_all_layouts_together_leave_few_groups_and_threads(layout: Layout) -> None:
    """A group for each set of ranks with this one, and for each of the three timeouts in use."""
    most = 3 * 2 ** (layout.world_size - 1)
    groups, threads = len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task"))
    assert groups <= most
    # Those that were destroyed or forgotten and still live are seen by their three threads alone.
    assert threads <= 3 * most + 8, f"{groups} groups"
