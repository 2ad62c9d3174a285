"""LoRA around a base linear: the routes of `megalora.contract`, for dense and expert layers alike.

t tensor-parallel size, n tokens, i/o in/out features, r rank, c scale.

The adapter sandwiches its base. `Depart` runs before the base: it computes s = x Aᵀ as far as
possible and starts what must travel. `Land` runs after the base: it finishes the travel and adds
c s Bᵀ in place. In backward the order is reversed: Land computes ds and starts its travel, the base
computes its own dX, then Depart finishes the travel and adds ds A in place into that dX. So every
collective but the two named beside the routes hides behind the base's GEMM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.collectives import (
    Exchange,
    Pending,
    done,
    group_size,
    own_shard,
    start_exchange,
    start_gather,
    start_reduce_scatter,
)
from megalora.contract import Factor, Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Journey:
    """Everything about one call of an adapter but its tensors.

    group: tensor-parallel group of the token tensors; a_group, b_group: groups over which lora_A
    and lora_B are sharded. a_offsets, b_offsets: token offsets [E] of a grouped factor, None where
    the factor is one for all tokens. segments: of the columns of y that lora_B (gathered where the
    route says so) covers. seed: int64 [1] of the dropout mask, None without dropout.
    a_param, b_param: the factors' parameters where backward adds their gradients to Megatron's
    main_grad (gradient accumulation fusion), None where autograd gets them.
    """

    ops: Any
    route: Route
    scale: float
    segments: list[int]
    group: ProcessGroup | None = None
    a_group: ProcessGroup | None = None
    b_group: ProcessGroup | None = None
    a_offsets: Tensor | None = None
    b_offsets: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    a_param: torch.nn.Parameter | None = None
    b_param: torch.nn.Parameter | None = None


class _Luggage:
    """Tensors on their way between Depart and Land, in both directions."""

    __slots__ = ("b", "d_a_factor", "d_b", "ds", "lora_A", "s", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.lora_A: Tensor | None = None
        self.s: Pending | None = None
        self.b: Pending | None = None
        self.ds: Pending | None = None
        self.d_a_factor: Pending | None = None
        self.d_b: Pending | None = None


class Depart(torch.autograd.Function):
    """Before the base: pass x through, compute s, start what travels.

    x: [..., i] as the base reads it. Returns x and an empty anchor that orders Land after it.
    dgrad: dx += ds A, in place in the base's own dX. wgrad: dA, dB.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, lora_A: Tensor, lora_B: Tensor, journey: Journey, luggage: _Luggage
    ) -> tuple[Tensor, Tensor]:
        ctx.journey, ctx.luggage, ctx.b_shape = journey, luggage, lora_B.shape
        ctx.save_for_backward(x, lora_A)
        ctx.set_materialize_grads(False)
        _start_forward(x, lora_A, lora_B, journey, luggage)
        passed = x.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        return passed, x.new_empty(0)

    @staticmethod
    def backward(ctx, dx: Tensor | None, _anchor: Tensor | None):  # type: ignore[override]
        journey, luggage = ctx.journey, ctx.luggage
        x, lora_A = ctx.saved_tensors
        assert luggage.ds is not None
        ds = luggage.ds.wait()
        d_a = _start_a_grad(ds, x, journey) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            full_a = luggage.d_a_factor.wait() if luggage.d_a_factor is not None else lora_A
            dx = _add_to_x_grad(dx, ds, x, full_a, journey)
        d_a = _deliver(d_a, journey.a_param, lora_A.shape)
        d_b = _deliver(luggage.d_b, journey.b_param, ctx.b_shape)
        luggage.ds = luggage.d_a_factor = luggage.d_b = None
        return dx, d_a, d_b, None, None


class Land(torch.autograd.Function):
    """After the base: finish what travels, add c s Bᵀ in place into y [..., o].

    dgrad: ds = c dY B, started on its way; dY itself passes on to the base. wgrad: dB, started.
    """

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, journey: Journey, luggage: _Luggage) -> Tensor:  # type: ignore[override]
        s, full_b = _finish_forward(journey, luggage)
        ctx.journey, ctx.luggage = journey, luggage
        ctx.save_for_backward(s, full_b)
        ctx.lora_A = luggage.lora_A
        luggage.x = luggage.lora_A = luggage.s = luggage.b = None
        journey.ops.expand_(y, s, full_b, journey.scale, journey.b_offsets, journey.segments)
        # A fresh handle: y may be a view that autograd forbids to change in place.
        return y.detach()

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        s, full_b = ctx.saved_tensors
        _start_backward(dy, s, full_b, ctx.lora_A, ctx.journey, ctx.luggage)
        return dy, dy.new_empty(0), None, None


def _add_to_x_grad(
    dx: Tensor | None, ds: Tensor, x: Tensor, full_a: Tensor, journey: Journey
) -> Tensor:
    """Add ds A to dx in place; write it in one pass where there is no dx of the base's yet."""
    if dx is None and journey.a_offsets is None and journey.dropout == 0.0:
        return torch.matmul(ds, full_a)
    if dx is None:
        dx = torch.zeros_like(x)
    journey.ops.shrink_dgrad_(
        dx, ds, full_a, journey.a_offsets, p=journey.dropout, seed=journey.seed
    )
    return dx


def adapt(
    base_forward: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, journey: Journey
) -> tuple[Tensor, Any]:
    """Run a base linear with its adapter around it.

    base_forward: callable of x that returns (y, rest). Returns (y + c s Bᵀ, rest).
    """
    luggage = _Luggage()
    x, anchor = Depart.apply(x, lora_A, lora_B, journey, luggage)  # type: ignore[misc]
    y, rest = base_forward(x)
    return Land.apply(y, anchor, journey, luggage), rest  # type: ignore[return-value]


def add_update(x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, journey: Journey) -> Tensor:
    """Add an adapter whose input is known only after its base has run: y + c s Bᵀ."""
    luggage = _Luggage()
    _, anchor = Depart.apply(x, lora_A, lora_B, journey, luggage)  # type: ignore[misc]
    return Land.apply(y, anchor, journey, luggage)  # type: ignore[return-value]


def _start_forward(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, journey: Journey, luggage: _Luggage
) -> None:
    route = journey.route
    luggage.x, luggage.lora_A = x, lora_A
    gathers_b = route.b is not Factor.LOCAL
    luggage.b = start_gather(lora_B, -2, journey.b_group) if gathers_b else done(lora_B)
    gathers_a = route.a is not Factor.LOCAL
    a = start_gather(lora_A, -1, journey.a_group) if gathers_a else done(lora_A)

    def shrink() -> Tensor:
        return journey.ops.shrink(
            x, a.wait(), journey.a_offsets, p=journey.dropout, seed=journey.seed
        )

    # Where s does not travel, the gather of A hides behind the base and s is computed after it.
    deferred = gathers_a and route.forward is Exchange.NONE and group_size(journey.a_group) > 1
    if deferred:
        luggage.s = Pending(shrink)
    else:
        luggage.s = start_exchange(shrink(), route.forward, journey.group)


def _finish_forward(journey: Journey, luggage: _Luggage) -> tuple[Tensor, Tensor]:
    assert luggage.s is not None
    assert luggage.b is not None
    return luggage.s.wait(), luggage.b.wait()


def _start_backward(
    dy: Tensor,
    s: Tensor,
    full_b: Tensor,
    lora_A: Tensor,
    journey: Journey,
    luggage: _Luggage,
) -> None:
    ops, route = journey.ops, journey.route
    if route.a is not Factor.LOCAL:
        luggage.d_a_factor = start_gather(lora_A, -1, journey.a_group)
    segments = journey.segments
    how = (journey.scale, journey.b_offsets, segments)
    if route.b is Factor.SLICED:
        ds = ops.expand_dgrad(dy, full_b, *how)
        luggage.ds = start_exchange(ds, route.backward, journey.group)
        luggage.d_b = _sliced_b_grad(dy, s, full_b, journey)
        return
    if route.b is Factor.LOCAL and journey.b_param is not None:
        main_grad = _main_grad(journey.b_param, full_b.shape)
        ds = ops.expand_backward_(main_grad, dy, s, full_b, *how)
        luggage.ds = start_exchange(ds, route.backward, journey.group)
        return
    ds, d_b = ops.expand_backward(dy, s, full_b, *how)
    luggage.ds = start_exchange(ds, route.backward, journey.group)
    is_summed = route.b is Factor.SUMMED
    luggage.d_b = start_reduce_scatter(d_b, -2, journey.b_group) if is_summed else done(d_b)


def _sliced_b_grad(dy: Tensor, s: Tensor, full_b: Tensor, journey: Journey) -> Pending | None:
    how = (journey.scale, journey.b_offsets, journey.segments)
    if journey.segments:
        # A shard may begin within a period of columns: slice the gradient, not dy.
        d_b = journey.ops.expand_wgrad(dy, s, full_b, *how)
        return done(own_shard(d_b, -2, journey.b_group))
    dy = own_shard(dy, -1, journey.b_group)
    shard = own_shard(full_b, -2, journey.b_group)
    if journey.b_param is not None:
        journey.ops.expand_wgrad_(_main_grad(journey.b_param, shard.shape), dy, s, *how)
        return None
    return done(journey.ops.expand_wgrad(dy, s, shard, *how))


def _start_a_grad(ds: Tensor, x: Tensor, journey: Journey) -> Pending | None:
    route, how = journey.route, {"p": journey.dropout, "seed": journey.seed}
    if route.a is Factor.SLICED and journey.dropout > 0.0:
        # The mask counts elements of the whole x: slice the gradient, not x.
        d_a = journey.ops.shrink_wgrad(ds, x, journey.a_offsets, **how)
        return done(own_shard(d_a, -1, journey.a_group).contiguous())
    if route.a is Factor.SLICED:
        x = own_shard(x, -1, journey.a_group)
    if route.a is not Factor.SUMMED and journey.a_param is not None:
        experts = () if journey.a_offsets is None else journey.a_offsets.shape
        main_grad = _main_grad(journey.a_param, (*experts, ds.shape[-1], x.shape[-1]))
        journey.ops.shrink_wgrad_(main_grad, ds, x, journey.a_offsets, **how)
        return None
    d_a = journey.ops.shrink_wgrad(ds, x, journey.a_offsets, **how)
    if route.a is Factor.SUMMED:
        return start_reduce_scatter(d_a, -1, journey.a_group)
    return done(d_a)


def _main_grad(param: torch.nn.Parameter, shape: Sequence[int]) -> Tensor:
    """Return Megatron's gradient buffer of a parameter in the shape of the factor's rows."""
    return param.main_grad.view(shape)  # type: ignore[attr-defined]


def _deliver(
    gradient: Pending | None, param: torch.nn.Parameter | None, shape: Sequence[int]
) -> Tensor | None:
    """Return what autograd gets: the gradient, or a stand-in where main_grad has it already.

    DDP's hook, which starts the reduction, runs only where autograd has something to accumulate,
    and drops it where grad_added_to_main_grad is set.
    """
    if param is None:
        return gradient and gradient.wait()
    if gradient is not None:
        _main_grad(param, shape).add_(gradient.wait())
    param.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return param.new_empty(shape)
