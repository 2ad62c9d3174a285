"""What a plan counts: bytes that are held, collectives, products; on shapes as on numbers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalora.plan import shapes
from megalora.plan.meter import Meter
from tests.support import forked

META = torch.device("meta")
MIB = 2**20


def filled(*shape: int, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device=device)


@pytest.mark.parametrize("device", [torch.device("cpu"), META])
def test_held_is_what_is_alive_and_peak_the_most_that_was(device: torch.device) -> None:
    with Meter(device) as meter:
        a = filled(1024, 256, device=device)
        assert meter.live == MIB
        view = a.t()[3:]
        assert meter.live == MIB, "a view holds nothing of its own"
        b = a + 1
        del a
        assert meter.live == 2 * MIB, "the view keeps its storage"
        del view
        assert (meter.live, meter.peak) == (MIB, 2 * MIB)
        del b
        assert (meter.live, meter.peak) == (0, 2 * MIB)


@pytest.mark.parametrize("device", [torch.device("cpu"), META])
def test_what_autograd_keeps_is_held_until_backward(device: torch.device) -> None:
    weight = filled(256, 256, device=device).requires_grad_()
    x = filled(1024, 256, device=device)
    with Meter(device) as meter:
        assert meter.hold([weight, x]) == weight.nbytes + x.nbytes
        before = meter.live
        y = torch.tanh(x @ weight)
        loss = y.sum()
        # tanh keeps its result, the product its input, which is x: the product's result is freed.
        assert meter.live - before == y.nbytes + loss.nbytes
        loss.backward()
        del y, loss
        assert weight.grad is not None
        assert meter.live - before == weight.grad.nbytes


def test_what_was_held_before_is_counted_once() -> None:
    x = filled(4, 4, device=META)
    meter = Meter()
    assert meter.hold([x, x.t(), torch.empty(3)]) == 64
    assert meter.hold([x]) == 0


def test_products_are_counted_by_shape_phase_and_who_asks() -> None:
    x, weight = filled(8, 16, device=META), filled(32, 16, device=META)
    with Meter() as meter:
        for phase in ("a", "a", "b"):
            with meter.during(phase):
                x @ weight.t()
    found = {(p.phase, p.shapes): (meter.products[p], meter.flops[p]) for p in meter.products}
    sizes = ((8, 16), (16, 32))
    assert found == {("a", sizes): (2, 2 * 2 * 8 * 16 * 32), ("b", sizes): (1, 2 * 8 * 16 * 32)}
    assert {product.owner for product in meter.products} == {__name__}


def operations(device: torch.device) -> list[Tensor]:
    """Do operations of many kinds, with results of shapes and strides that are no given one's."""
    x = (
        torch.rand(2, 6, 4, device=device)
        if device.type == "cpu"
        else filled(2, 6, 4, device=device)
    )
    y = x.transpose(0, 1)
    kept = F.dropout(x, 0.5)
    pieces = torch.cat([y, y * 2], dim=-1)
    return [
        *(x + 1, y + 1, y * x.transpose(0, 1), x @ x.mT, F.silu(y), x.sum(0), x.sum((0, 2))),
        *(y.contiguous(), y.clone(), x.to(torch.bfloat16), x > 0, torch.zeros_like(y), kept),
        *(pieces, F.softmax(y, -1), x.view(12, 4).t(), x.unsqueeze(1).expand(2, 3, 6, 4) + 0),
        *(x + 1, x + 1.0, x.bool() + 1, x.bool() + True),
    ]


def test_remembered_shapes_are_those_of_numbers() -> None:
    shapes._made.clear()
    real = operations(torch.device("cpu"))
    with Meter():
        made = operations(META)
        assert shapes._made
        again = operations(META)
    for number, first, second in zip(real, made, again, strict=True):
        expected = (number.shape, number.stride(), number.dtype)
        assert (first.shape, first.stride(), first.dtype) == expected
        assert (second.shape, second.stride(), second.dtype) == expected
    for first, second in itertools.pairwise(again):
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_what_writes_in_place_or_is_a_view_is_never_remembered() -> None:
    shapes._made.clear()
    with Meter() as meter:
        x = filled(4, 4, device=META)
        for _ in range(2):
            assert x.add_(1) is x
            assert x.view(16).untyped_storage()._cdata == x.untyped_storage()._cdata
        assert meter.live == 64


def groups_of_a_world() -> dict[str, object]:
    """Make the groups of one rank of 512; return which ranks are in them."""
    import torch.distributed as dist

    from megalora.plan import world

    world.install()
    world.become(300, 512)
    dist.init_process_group("nccl")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=8,
        expert_model_parallel_size=16,
        expert_tensor_parallel_size=1,
    )
    with Meter() as meter:
        x = torch.empty(8, 4, device="meta")
        group = parallel_state.get_tensor_model_parallel_group()
        out = torch.empty(32, 4, device="meta")
        dist.all_gather_into_tensor(out, x, group=group)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        work.wait()
    told = ["own"]
    dist.broadcast_object_list(told, src=0)
    gathered = [None] * 4
    dist.all_gather_object(gathered, "own", group=group)
    return {
        "tensor": dist.get_process_group_ranks(group),
        "stages": dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
        "experts": dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group()),
        "calls": sorted((c.kind, len(c.ranks), n, meter.sent[c]) for c, n in meter.calls.items()),
        "told": told,
        "gathered": gathered,
    }


def test_a_rank_of_a_world_without_others_has_its_groups_and_sends_what_is_counted() -> None:
    found = forked.call(groups_of_a_world)
    assert found["tensor"] == [300, 301, 302, 303]
    # Tensor ranks are next to each other, then data-parallel ranks, then stages: 64 apart.
    assert found["stages"] == list(range(300 % 64, 512, 64))
    assert found["experts"] == list(range(288, 304))
    assert found["calls"] == [("_allgather_base_", 4, 1, 512), ("allreduce_", 512, 1, 128)]
    assert found["told"] == ["own"]
    assert found["gathered"] == ["own"] * 4
