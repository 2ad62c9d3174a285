"""What ranks tell each other: every rank says the same afterwards, whoever had something to say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.adapters import world
from megalora.adapters.finite import refuse
from megalora.checkpoint.ranks import on_all_ranks


def in_worlds(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test that holds for every number of ranks on two and on four."""
    return pytest.mark.world_2(pytest.mark.world_4(test))


def told_alike(own: Any) -> Any:
    """Return what this rank found, which must be what all found."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    assert everywhere == [own] * len(everywhere)
    return own


def one_pair_or_none() -> list[set[int]]:
    """Return the ranks that have something to say: none, each alone, the last two, all."""
    size = dist.get_world_size()
    return [set(), *({rank} for rank in range(size)), {size - 2, size - 1}, set(range(size))]


@in_worlds
def test_the_first_rank_that_speaks_is_known_to_all() -> None:
    for speakers in one_pair_or_none():
        found = told_alike(world.first_rank(dist.get_rank() in speakers))
        assert found == min(speakers, default=None)


@in_worlds
@pytest.mark.parametrize("sends", ["cpu:gloo,cuda:gloo", "cuda:nccl"])
def test_a_tensor_is_sent_from_where_the_group_sends(
    sends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broadcast, sent = dist.broadcast, list[torch.Tensor]()

    def seen(tensor: torch.Tensor, **where: Any) -> None:
        sent.append(tensor)
        broadcast(tensor, **where)

    group: Any = dist.group.WORLD
    monkeypatch.setattr(dist, "broadcast", seen)
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: sends)
    parameter = torch.nn.Parameter(torch.full((2, 3), float(dist.get_rank())))
    with torch.no_grad():
        world.sent_by(1, parameter, group)
    assert parameter.tolist() == [[1.0] * 3] * 2
    # On the CPU, a model that is not on its GPU yet, from which NCCL sends nothing.
    assert (sent[0] is parameter) == ("cpu:" in sends)


@in_worlds
@pytest.mark.bad_input("a rank that disagrees")
@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_what_the_first_rank_finds_wrong_is_raised_on_all(kind: type[Exception]) -> None:
    rank = dist.get_rank()
    for speakers in one_pair_or_none():

        def work(speakers: set[int] = speakers) -> int:
            if rank in speakers:
                raise kind(f"lost on {rank}")
            return 10 + rank

        if not speakers:
            assert on_all_ranks(work) == 10 + rank
            continue
        with pytest.raises(ValueError, match=f"^lost on {min(speakers)}$"):
            on_all_ranks(work)


@in_worlds
@pytest.mark.bad_input("a rank that disagrees")
def test_what_one_rank_alone_does_is_told_or_raised_on_all() -> None:
    last = dist.get_world_size() - 1
    assert told_alike(on_all_ranks(lambda: ["made", dist.get_rank()], only=last)) == ["made", last]

    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(ValueError, match=r"^no room$"):
        on_all_ranks(fail, only=0)


@in_worlds
@pytest.mark.bad_input("a number that is not one")
def test_names_of_all_ranks_are_in_one_sentence() -> None:
    rank = dist.get_rank()
    for speakers in one_pair_or_none():
        # A name that all have is said once, as that of a family is.
        names = {f"weight {rank} {n}" for n in range(3)} | {"both"} if rank in speakers else set()
        if not speakers:
            refuse(names, "bad: {}".format)
            continue
        everything = sorted({"both"} | {f"weight {r} {n}" for r in speakers for n in range(3)})
        more = f" and {len(everything) - 4} more" if len(everything) > 4 else ""
        with pytest.raises(ValueError, match="bad: ") as error:
            refuse(names, "bad: {}".format)
        assert told_alike(str(error.value)) == f"bad: {', '.join(everything[:4])}{more}"


@in_worlds
def test_a_union_has_the_names_of_all_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    cases: list[tuple[set[Any], set[Any]]] = [
        (set(), set()),
        ({7}, {7}),
        ({rank}, set(range(size))),
        ({0, rank, rank + 1}, set(range(size + 1))),
        ({"last"} if rank == size - 1 else set(), {"last"}),
    ]
    for own, expected in cases:
        assert told_alike(world.union(own, dist.group.WORLD)) == expected
    assert world.union({rank}, None) == {rank}


@pytest.mark.world_4
def test_ranks_of_a_group_are_counted_in_it() -> None:
    pairs: list[Any] = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    group = pairs[dist.get_rank() % 2]
    members = dist.get_process_group_ranks(group)
    own = {f"rank {dist.get_rank()}"}
    assert world.union(own, group) == {f"rank {rank}" for rank in members}
    is_second = dist.get_rank() == members[1]
    assert world.first_rank(is_second, group) == 1
    assert world.told_by(1, own, group) == {f"rank {members[1]}"}
    assert world.summed(torch.tensor([1.5]), group).tolist() == [3.0]
    assert world.largest([dist.get_rank()], group) == [max(members)]
    for pair in pairs:
        if dist.get_rank() in dist.get_process_group_ranks(pair):
            dist.destroy_process_group(pair)


@in_worlds
def test_numbers_are_summed_and_compared_over_all_ranks() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    own = torch.tensor([[1, 0.1 * rank], [2.0**53, -rank]], dtype=torch.float64)
    total = told_alike(world.summed(own).tolist())
    assert total[0] == [size, pytest.approx(0.1 * sum(range(size)))]
    assert own[0, 0] == 1
    assert told_alike(world.largest([-1.0, float(rank), -float(rank)])) == [-1, size - 1, 0]


@in_worlds
def test_those_who_speak_are_heard_in_the_order_of_their_numbers() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    # Every second one, the last first; what they say is of different sizes, and of none.
    number = (size - 1 - rank) // 2 if rank % 2 else None
    said = {"rank": rank, "more": torch.arange(3 * rank).tolist()}
    found = told_alike(world.told_by_each(number, said, size // 2))
    assert [one["rank"] for one in found] == [rank for rank in range(size)[::-1] if rank % 2]
    assert all(one["more"] == list(range(3 * one["rank"])) for one in found)
    assert world.told_by_each(None if rank else 0, None, 1) == [None]


@in_worlds
def test_tensors_go_where_the_backend_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.device_of() == torch.device("cpu")
    for config, device in (("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert world.device_of(dist.group.WORLD).type == device
