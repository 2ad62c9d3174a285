"""Say in plain torch what every op of `megalora::` must compute.

x, dx: [..., in], y, dy: [..., out], s, ds: [..., P*r], lora_A, d_a: [P*r, in] or [E, P*r, in],
lora_B, d_b: [out, r] or [E, out, r], weight: [out, in]. Everything is computed in fp32 (fp64 for
fp64 inputs) and rounded once to the dtype of the result; d_a and d_b, which are added to, may be
fp32 beside narrower tokens. Rows past the last offset are zero in results, untouched in place.
"""

from megalora.ops.gate import gate_, gate_backward_
from megalora.ops.products import (
    dropped,
    expand_,
    expand_backward,
    expand_backward_,
    expand_dgrad,
    expand_wgrad,
    expand_wgrad_,
    shrink,
    shrink_dgrad_,
    shrink_wgrad,
    shrink_wgrad_,
)
from megalora.ops.with_base import (
    experts_linear,
    experts_linear_backward,
    experts_linear_backward_,
    experts_linear_is_fused,
    gated_mlp,
    gated_mlp_backward,
    gated_mlp_backward_,
    gated_mlp_is_fused,
    linear,
    linear_backward,
    linear_backward_,
)

__all__ = [
    "dropped",
    "expand_",
    "expand_backward",
    "expand_backward_",
    "expand_dgrad",
    "expand_wgrad",
    "expand_wgrad_",
    "experts_linear",
    "experts_linear_backward",
    "experts_linear_backward_",
    "experts_linear_is_fused",
    "gate_",
    "gate_backward_",
    "gated_mlp",
    "gated_mlp_backward",
    "gated_mlp_backward_",
    "gated_mlp_is_fused",
    "linear",
    "linear_backward",
    "linear_backward_",
    "shrink",
    "shrink_dgrad_",
    "shrink_wgrad",
    "shrink_wgrad_",
]
