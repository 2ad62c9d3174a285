"""An adapter around or behind a closed base where nothing travels: its one node and its hook."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megalora.adapters import on_one_rank
from megalora.adapters.call import Call
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.adapters.sandwich import adapt, add_update
from megalora.ops import backend

SCALE = 0.7


def leaves(experts: int) -> list[Tensor]:
    """Return x [n, i], W [o, i], lora_A [2 r, i] and lora_B [o, r], all of them trained."""
    generator = torch.Generator().manual_seed(0)
    lead = (experts,) if experts else ()
    shapes = [(12, 6), (10, 6), (*lead, 8, 6), (*lead, 10, 4)]
    return [
        torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in shapes
    ]


def expected(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, ends: list[int]
) -> Tensor:
    """Return norm(x) Wᵀ + c s Bᵀ in plain torch: two projections, experts where there are ends."""
    normed = torch.nn.functional.rms_norm(x, (6,))
    updates = []
    factors = zip(lora_A, lora_B, strict=True) if ends else [(lora_A, lora_B)]
    tokens = torch.tensor_split(normed, ends[:-1]) if ends else [normed]
    for part, (a, b) in zip(tokens, factors, strict=True):
        pairs = zip((part @ a.mT).chunk(2, dim=1), b.chunk(2, dim=0), strict=True)
        updates.append(torch.cat([s @ rows.mT for s, rows in pairs], dim=1))
    return normed @ weight.mT + SCALE * torch.cat(updates)


def call_of(ops: str, ends: list[int]) -> Call:
    """Return a call with two projections, of experts where there are ends."""
    offsets = torch.tensor(ends) if ends else None
    return Call(
        ops=backend(ops),
        route=LOCAL_ROUTE,
        scale=SCALE,
        segments=[5, 5],
        a_offsets=offsets,
        b_offsets=offsets,
    )


def beside(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> Tensor:
    """Return norm(x) Wᵀ with the adapter around the product, where x is small."""
    normed = torch.nn.functional.rms_norm(x, (6,))
    return adapt(lambda inner: (inner @ weight.mT, None), normed, lora_A, lora_B, call)[0]


def around(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> Tensor:
    """Return the same as where x is not small."""
    with mock.patch.object(on_one_rank, "_SMALL", -1):
        return beside(x, weight, lora_A, lora_B, call)


def behind(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> Tensor:
    """Return norm(x) Wᵀ with the adapter behind it."""
    normed = torch.nn.functional.rms_norm(x, (6,))
    return add_update(normed, normed @ weight.mT, lora_A, lora_B, call)


WAYS: dict[str, Callable[..., Tensor]] = {"beside": beside, "around": around, "behind": behind}
EXPERTS = pytest.mark.parametrize("ends", [[], [5, 5, 12]], ids=["dense", "experts"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ops", ["fused", "reference"])
@EXPERTS
def test_every_gradient_is_right(ops: str, ends: list[int], way: str) -> None:
    trained = leaves(len(ends))
    got, wanted = WAYS[way](*trained, call_of(ops, ends)), expected(*trained, ends=ends)
    torch.testing.assert_close(got, wanted)
    dy = torch.randn(got.shape, dtype=torch.double)
    gradients = torch.autograd.grad(got, trained, dy, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, trained, dy))
    # Once more, as where a graph is kept.
    torch.testing.assert_close(torch.autograd.grad(got, trained, dy), gradients)


@EXPERTS
def test_every_way_drops_the_same(ends: list[int]) -> None:
    call = dataclasses.replace(call_of("fused", ends), dropout=0.4, seed=torch.tensor([7]))
    found = []
    for way in WAYS.values():
        trained = leaves(len(ends))
        y = way(*trained, call)
        found.append([y, *torch.autograd.grad(y, trained, torch.ones_like(y))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert not torch.allclose(found[0][0], expected(*leaves(len(ends)), ends=ends))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", [(0,), (2,), (3,), (0, 2), (2, 3)], ids=str)
def test_what_is_asked_for_alone_is_the_same(asked: tuple[int, ...], way: str) -> None:
    trained = leaves(0)
    for place, leaf in enumerate(trained):
        leaf.requires_grad_(place in asked)
    got, wanted = WAYS[way](*trained, call_of("fused", [])), expected(*trained, ends=[])
    dy = torch.randn(got.shape, dtype=torch.double)
    own = [trained[place] for place in asked]
    torch.testing.assert_close(
        torch.autograd.grad(got, own, dy), torch.autograd.grad(wanted, own, dy)
    )


@pytest.mark.parametrize("small", [-1, 2**18])
def test_x_has_the_adapters_gradient_where_the_base_gives_none(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_one_rank, "_SMALL", small)
    x, weight, lora_A, lora_B = leaves(0)
    call = call_of("fused", [])
    y, _ = adapt(lambda inner: (inner.detach() @ weight.detach().mT, None), x, lora_A, lora_B, call)
    blocks = zip((x @ lora_A.mT).chunk(2, dim=1), lora_B.chunk(2, dim=0), strict=True)
    update = SCALE * torch.cat([s @ b.mT for s, b in blocks], dim=1)
    dy = torch.randn(y.shape, dtype=torch.double)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(update, x, dy))


def test_the_adapter_has_one_node_and_adds_into_the_gradient_of_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_one_rank, "_SMALL", -1)
    x, weight, lora_A, lora_B = leaves(0)
    given: list[Tensor] = []

    class Base(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x @ weight.mT

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            given.append(dy @ weight)
            return given[-1]

    y, _ = adapt(lambda inner: (Base.apply(inner), None), x, lora_A, lora_B, call_of("fused", []))
    y.backward(torch.ones_like(y))
    node: Any = y.grad_fn
    assert node.name() == "UpdateBackward"
    assert node.next_functions[0][0].name() == "BaseBackward"
    assert x.grad is not None
    assert x.grad.data_ptr() == given[0].data_ptr()


def test_nothing_keeps_an_activation_that_autograd_packs_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where activations are offloaded: a hook that kept x itself would undo that."""
    monkeypatch.setattr(on_one_rank, "_SMALL", -1)
    x, weight, lora_A, lora_B = leaves(0)
    hidden = x * 2.0
    kept = StorageWeakRef(hidden.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y, _ = adapt(
            lambda inner: (inner @ weight.mT, None), hidden, lora_A, lora_B, call_of("fused", [])
        )
    del hidden
    assert kept.expired()
    y.sum().backward()


@pytest.mark.parametrize(
    ("way", "broken", "by"),
    [
        ("behind", on_one_rank, ("x_grad", lambda dx, ds, x, full_a, call: dx)),
        ("around", on_one_rank.XGrad, ("__call__", lambda self, dx: dx)),
    ],
)
def test_a_lost_part_of_the_gradient_is_noticed(
    way: str, broken: Any, by: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken, *by)
    with pytest.raises(AssertionError):
        test_every_gradient_is_right("reference", [], way)
