"""torch's own checks of the compiled ops: opcheck, gradcheck and torch.compile."""

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from megalora.ops.fused import load
from tests.support.op_cases import CASES, Case, draw, expert_weights

SEED = torch.tensor([11])
fused = load()


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=str)
def test_opcheck_accepts_every_op(case: Case) -> None:
    given = draw(case, torch.float32)
    ops, offsets, segments = torch.ops.megalora, given.offsets, given.segments
    x, lora_A = given.x.clone().requires_grad_(), given.lora_A.clone().requires_grad_()
    b_call = (given.lora_B, 0.5, offsets, segments)
    calls = {
        ops.shrink: (x, lora_A, offsets, 0.25, SEED),
        ops.expand_: (given.y, given.s, *b_call),
        ops.expand_dgrad: (given.y, *b_call),
        ops.expand_wgrad: (given.y, given.s, *b_call),
        ops.expand_backward: (given.y, given.s, *b_call),
        ops.shrink_dgrad_: (given.x, given.s, given.lora_A, offsets, 0.25, SEED),
        ops.shrink_wgrad: (given.s, given.x, offsets, 0.25, SEED),
        ops.expand_wgrad_: (given.lora_B.clone(), given.y, given.s, *b_call[1:]),
        ops.expand_backward_: (given.lora_B.clone(), given.y, given.s, *b_call),
        ops.shrink_wgrad_: (given.lora_A.clone(), given.s, given.x, offsets, 0.25, SEED),
    }
    if offsets is None:
        how = (given.weight, given.lora_A, given.lora_B, 0.5, segments)
        both = (given.y, given.x, given.s, *how)
        sums = (given.lora_A.clone(), given.lora_B.clone())
        calls |= {
            ops.linear: (given.x, *how),
            ops.linear_backward: both,
            ops.linear_backward_: (*sums, *both),
        }
    if offsets is not None:
        how = (expert_weights(given), given.lora_A, given.lora_B, 0.5, offsets, segments)
        thin = torch.nn.functional.pad(given.s, (0, -given.s.shape[1] % 8))
        sums = (given.lora_A.clone(), given.lora_B.clone())
        calls |= {
            ops.experts_linear: (given.x, *how),
            ops.experts_linear_backward: (given.y, given.x, thin, *how),
            ops.experts_linear_backward_: (*sums, given.y, given.x, thin, *how),
        }
    for op, arguments in calls.items():
        torch.library.opcheck(op.default, arguments)


def test_opcheck_accepts_calls_that_leave_out_what_has_a_default() -> None:
    given = draw(CASES[0], torch.float32)
    assert given.offsets is None
    x, lora_A = given.x.clone().requires_grad_(), given.lora_A.clone().requires_grad_()
    b_call = (given.lora_B, 0.5)
    both = (given.y, given.x, given.s, given.weight, given.lora_A, *b_call)
    calls = {
        fused.shrink: (x, lora_A),
        fused.expand_dgrad: (given.y, *b_call),
        fused.expand_wgrad: (given.y, given.s, *b_call),
        fused.expand_backward: (given.y, given.s, *b_call),
        fused.shrink_wgrad: (given.s, given.x),
        fused.expand_backward_: (given.lora_B.clone(), given.y, given.s, *b_call),
        fused.linear: (given.x, given.weight, given.lora_A, *b_call),
        fused.linear_backward: both,
        fused.linear_backward_: (given.lora_A.clone(), given.lora_B.clone(), *both),
    }
    for op, arguments in calls.items():
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


class LoRALinear(torch.autograd.Function):
    """y = x Wᵀ + scale * dropout(x) Aᵀ Bᵀ and all its gradients, made of the ops."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, offsets, segments, p):
        s = fused.shrink(x, lora_A, offsets, p=p, seed=SEED)
        y = x @ weight.T
        fused.expand_(y, s, lora_B, 0.5, offsets, segments)
        ctx.save_for_backward(x, weight, lora_A, lora_B, s, offsets)
        ctx.segments, ctx.p = segments, p
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, lora_A, lora_B, s, offsets = ctx.saved_tensors
        ds, d_b = fused.expand_backward(dy, s, lora_B, 0.5, offsets, ctx.segments)
        dx = dy @ weight
        fused.shrink_dgrad_(dx, ds, lora_A, offsets, p=ctx.p, seed=SEED)
        d_a = fused.shrink_wgrad(ds, x, offsets, p=ctx.p, seed=SEED)
        return dx, None, d_a, d_b, None, None, None


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("experts", [0, 3])
def test_the_gradients_pass_gradcheck(experts: int, p: float) -> None:
    given = draw(Case(6, 5, (2, 1), 2, rank=2, experts=experts), torch.float64)
    weight = torch.randn(6, 5, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (given.x, given.lora_A, given.lora_B)]

    def linear(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return LoRALinear.apply(x, weight, lora_A, lora_B, given.offsets, given.segments, p)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(linear, leaves)


def test_gradcheck_notices_a_gradient_of_another_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the check above must fail where backward drops other elements than forward."""
    x, lora_A, weight = (
        torch.randn(6, 5).double(),
        torch.randn(2, 5).double(),
        torch.zeros(4, 5).double(),
    )
    lora_B = torch.randn(4, 2).double()
    right = fused.shrink_wgrad
    monkeypatch.setattr(
        fused,
        "shrink_wgrad",
        lambda ds, x, offsets, p, seed: right(ds, x, offsets, p=p, seed=seed + 1),
    )
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(
            lambda a: LoRALinear.apply(x, weight, a, lora_B, None, [], 0.4),
            [lora_A.requires_grad_()],
        )


@pytest.mark.parametrize("experts", [0, 3])
def test_a_lora_linear_compiles_to_one_graph(experts: int) -> None:
    given = draw(Case(12, 8, (4, 2), 2, rank=3, experts=experts), torch.float32)
    weight = torch.randn(12, 8)

    def linear(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return LoRALinear.apply(x, weight, lora_A, lora_B, given.offsets, given.segments, 0.2)  # type: ignore[return-value]

    results = []
    for function in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (given.x, given.lora_A, given.lora_B)]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
