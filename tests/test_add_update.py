"""An adapter behind its base, whose input has a gradient from elsewhere too."""

import pytest
import torch
from torch import Tensor

from megalora.adapters import sandwich
from megalora.adapters.routes import LOCAL_ROUTE
from megalora.adapters.sandwich import Call, add_update
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


def expected(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, ends: list[int]) -> Tensor:
    """Return norm(x) Wᵀ + c s Bᵀ in plain torch: two projections, experts where there are ends."""
    normed = torch.nn.functional.rms_norm(x, (6,))
    updates = []
    factors = zip(lora_A, lora_B, strict=True) if ends else [(lora_A, lora_B)]
    tokens = torch.tensor_split(normed, ends[:-1]) if ends else [normed]
    for part, (a, b) in zip(tokens, factors, strict=True):
        pairs = zip((part @ a.mT).chunk(2, dim=1), b.chunk(2, dim=0), strict=True)
        updates.append(torch.cat([s @ rows.mT for s, rows in pairs], dim=1))
    return normed @ weight.mT + SCALE * torch.cat(updates)


@pytest.mark.parametrize("ops", ["fused", "reference"])
@pytest.mark.parametrize("ends", [[], [5, 5, 12]], ids=["dense", "experts"])
def test_every_gradient_of_an_adapter_behind_its_base_is_right(ops: str, ends: list[int]) -> None:
    offsets = torch.tensor(ends) if ends else None
    call = Call(
        ops=backend(ops),
        route=LOCAL_ROUTE,
        scale=SCALE,
        segments=[5, 5],
        a_offsets=offsets,
        b_offsets=offsets,
    )
    x, weight, lora_A, lora_B = leaves(len(ends))
    normed = torch.nn.functional.rms_norm(x, (6,))
    got = add_update(normed, normed @ weight.mT, lora_A, lora_B, call)
    wanted = expected(x, weight, lora_A, lora_B, ends)
    torch.testing.assert_close(got, wanted)
    dy = torch.randn(got.shape, dtype=torch.double)
    trained = (x, weight, lora_A, lora_B)
    torch.testing.assert_close(
        torch.autograd.grad(got, trained, dy), torch.autograd.grad(wanted, trained, dy)
    )


def test_a_lost_part_of_the_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandwich, "_add_to_x_grad", lambda dx, ds, x, full_a, call: dx)
    with pytest.raises(AssertionError):
        test_every_gradient_of_an_adapter_behind_its_base_is_right("reference", [])
