"""LoRA around a base linear: its routes (`adapters.routes`) for dense and expert layers alike.

t tensor-parallel size, n tokens, i/o in/out features, r rank, c scale.

The adapter sandwiches its base. `BeforeBase` computes s = x Aᵀ as far as possible and starts what
must travel. `AfterBase` finishes the travel and adds c s Bᵀ in place. In backward the order is
reversed: AfterBase computes ds and starts its travel, the base computes its own dX, then BeforeBase
finishes the travel and adds ds A in place into that dX. So every collective but the two named
beside the routes hides behind the base's GEMM. Where nothing travels one node does:
`adapters.on_one_rank`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalora.adapters.autocast import autocast_dtype, cast, is_autocast
from megalora.adapters.call import Call, deliver, main_grad_of, x_grad
from megalora.adapters.collectives import (
    Collective,
    Pending,
    done,
    group_size,
    own_shard,
    start_collective,
    start_gather,
    start_reduce_scatter,
)
from megalora.adapters.node import apply
from megalora.adapters.on_one_rank import adapt_on_one_rank, add_on_one_rank
from megalora.adapters.routes import LOCAL_ROUTE, ShardUse


class _InFlight:
    """Tensors on their way between BeforeBase and AfterBase, in both directions."""

    __slots__ = ("b", "d_a_factor", "d_b", "ds", "lora_A", "s", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.lora_A: Tensor | None = None
        self.s: Pending | None = None
        self.b: Pending | None = None
        self.ds: Pending | None = None
        self.d_a_factor: Pending | None = None
        self.d_b: Pending | None = None


class BeforeBase(torch.autograd.Function):
    """Before the base: pass x through, compute s, start what travels.

    x: [..., i] as the base reads it. Returns x and an empty anchor that orders AfterBase after it.
    dgrad: dx += ds A, in place in the base's own dX. wgrad: dA, dB.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call, in_flight: _InFlight
    ) -> tuple[Tensor, Tensor]:
        """Start s and the gathers of A and B that the route asks for."""
        ctx.call, ctx.in_flight, ctx.b_shape = call, in_flight, lora_B.shape
        ctx.save_for_backward(x, lora_A)
        ctx.set_materialize_grads(False)
        _start_forward(x, lora_A, lora_B, call, in_flight)
        passed = x.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        return passed, x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, _anchor: Tensor | None):  # type: ignore[override]
        """Finish ds, add ds A to dx, and finish dA and dB."""
        call, in_flight = ctx.call, ctx.in_flight
        x, lora_A = ctx.saved_tensors
        assert in_flight.ds is not None
        ds = in_flight.ds.wait()
        d_a = _start_a_grad(ds, x, call) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            full_a = in_flight.d_a_factor.wait() if in_flight.d_a_factor is not None else lora_A
            dx = x_grad(dx, ds, x, full_a, call)
        d_a = deliver(d_a, call.a_param, lora_A.shape)
        d_b = deliver(in_flight.d_b, call.b_param, ctx.b_shape)
        in_flight.ds = in_flight.d_a_factor = in_flight.d_b = None
        return dx, d_a, d_b, None, None


class AfterBase(torch.autograd.Function):
    """After the base: finish what travels, add c s Bᵀ in place into y [..., o].

    dgrad: ds = c dY B, started on its way; dY itself passes on to the base. wgrad: dB, started.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, anchor: Tensor, call: Call, in_flight: _InFlight
    ) -> Tensor:
        """Finish s and B, and add c s Bᵀ to y."""
        s, full_b = _finish_forward(call, in_flight)
        ctx.call, ctx.in_flight = call, in_flight
        ctx.save_for_backward(s, full_b)
        ctx.lora_A = in_flight.lora_A
        in_flight.x = in_flight.lora_A = in_flight.s = in_flight.b = None
        call.ops.expand_(call.covered(y), s, full_b, call.scale, call.b_offsets, call.segments)
        # A fresh handle: y may be a view that autograd forbids to change in place.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        """Start ds and dB."""
        s, full_b = ctx.saved_tensors
        _start_backward(ctx.call.covered(dy), s, full_b, ctx.lora_A, ctx.call, ctx.in_flight)
        return dy, dy.new_empty(0), None, None


def adapt[Rest](
    base_forward: Callable[[Tensor], tuple[Tensor, Rest]],
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    call: Call,
) -> tuple[Tensor, Rest]:
    """Run a base linear with its adapter around it.

    base_forward: callable of x that returns (y, rest). Returns (y + c s Bᵀ, rest).
    """
    if is_autocast(x):
        x, lora_A, lora_B = cast(autocast_dtype(x), x, lora_A, lora_B)
    if call.route is LOCAL_ROUTE:
        return adapt_on_one_rank(base_forward, x, lora_A, lora_B, call)
    in_flight = _InFlight()
    x, anchor = apply(BeforeBase, x, lora_A, lora_B, call, in_flight)
    y, rest = base_forward(x)
    return apply(AfterBase, y, anchor, call, in_flight), rest


def add_update(x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call) -> Tensor:
    """Add an adapter whose input is known only after its base has run: y + c s Bᵀ."""
    if is_autocast(x):
        x, lora_A, lora_B = cast(y.dtype, x, lora_A, lora_B)
    if call.route is LOCAL_ROUTE:
        return add_on_one_rank(x, y, lora_A, lora_B, call)
    in_flight = _InFlight()
    _, anchor = apply(BeforeBase, x, lora_A, lora_B, call, in_flight)
    return apply(AfterBase, y, anchor, call, in_flight)


def _start_forward(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, call: Call, in_flight: _InFlight
) -> None:
    route = call.route
    in_flight.x, in_flight.lora_A = x, lora_A
    gathers_b = route.b is not ShardUse.LOCAL
    in_flight.b = start_gather(lora_B, -2, call.b_group) if gathers_b else done(lora_B)
    gathers_a = route.a is not ShardUse.LOCAL
    a = start_gather(lora_A, -1, call.a_group) if gathers_a else done(lora_A)

    def shrink() -> Tensor:
        return call.ops.shrink(x, a.wait(), call.a_offsets, call.dropout, call.seed)

    # Where s does not travel, the gather of A hides behind the base and s is computed after it.
    deferred = gathers_a and route.forward is Collective.NONE and group_size(call.a_group) > 1
    if deferred:
        in_flight.s = Pending(shrink)
    else:
        in_flight.s = start_collective(shrink(), route.forward, call.group)


def _finish_forward(call: Call, in_flight: _InFlight) -> tuple[Tensor, Tensor]:
    assert in_flight.s is not None
    assert in_flight.b is not None
    return in_flight.s.wait(), in_flight.b.wait()


def _start_backward(
    dy: Tensor,
    s: Tensor,
    full_b: Tensor,
    lora_A: Tensor,
    call: Call,
    in_flight: _InFlight,
) -> None:
    ops, route = call.ops, call.route
    if route.a is not ShardUse.LOCAL:
        in_flight.d_a_factor = start_gather(lora_A, -1, call.a_group)
    segments = call.segments
    how = (call.scale, call.b_offsets, segments)
    if route.b is ShardUse.SLICED:
        ds = ops.expand_dgrad(dy, full_b, *how)
        in_flight.ds = start_collective(ds, route.backward, call.group)
        in_flight.d_b = _sliced_b_grad(dy, s, full_b, call)
        return
    if route.b is ShardUse.LOCAL and call.b_param is not None:
        main_grad = main_grad_of(call.b_param, full_b.shape)
        ds = ops.expand_backward_(main_grad, dy, s, full_b, *how)
        in_flight.ds = start_collective(ds, route.backward, call.group)
        return
    ds, d_b = ops.expand_backward(dy, s, full_b, *how)
    in_flight.ds = start_collective(ds, route.backward, call.group)
    is_summed = route.b is ShardUse.SUMMED
    in_flight.d_b = start_reduce_scatter(d_b, -2, call.b_group) if is_summed else done(d_b)


def _sliced_b_grad(dy: Tensor, s: Tensor, full_b: Tensor, call: Call) -> Pending | None:
    how = (call.scale, call.b_offsets, call.segments)
    if call.segments:
        # A shard may begin within a period of columns: slice the gradient, not dy.
        d_b = call.ops.expand_wgrad(dy, s, full_b, *how)
        return done(own_shard(d_b, -2, call.b_group))
    dy = own_shard(dy, -1, call.b_group)
    shard = own_shard(full_b, -2, call.b_group)
    if call.b_param is not None:
        call.ops.expand_wgrad_(main_grad_of(call.b_param, shard.shape), dy, s, *how)
        return None
    return done(call.ops.expand_wgrad(dy, s, shard, *how))


def _start_a_grad(ds: Tensor, x: Tensor, call: Call) -> Pending | None:
    route, how = call.route, (call.a_offsets, call.dropout, call.seed)
    if route.a is ShardUse.SLICED and call.dropout > 0.0:
        # The mask counts elements of the whole x: slice the gradient, not x.
        d_a = call.ops.shrink_wgrad(ds, x, *how)
        return done(own_shard(d_a, -1, call.a_group).contiguous())
    if route.a is ShardUse.SLICED:
        x = own_shard(x, -1, call.a_group)
    if route.a is not ShardUse.SUMMED and call.a_param is not None:
        experts = () if call.a_offsets is None else call.a_offsets.shape
        main_grad = main_grad_of(call.a_param, (*experts, ds.shape[-1], x.shape[-1]))
        call.ops.shrink_wgrad_(main_grad, ds, x, *how)
        return None
    d_a = call.ops.shrink_wgrad(ds, x, *how)
    if route.a is ShardUse.SUMMED:
        return start_reduce_scatter(d_a, -1, call.a_group)
    return done(d_a)
