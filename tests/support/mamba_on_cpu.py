"""Megatron's real hybrid models on the CPU: torch stands in for Mamba's CUDA kernels.

Only what training calls: `mamba_ssm`'s fused convolution and scan, its norm, and of einops (where
that is not installed) two patterns.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Let MambaMixer find the stand-ins; to be called before anything imports it."""
    mixer = "megatron.core.ssm.mamba_mixer"
    assert mixer not in sys.modules, f"{mixer} is imported and has looked for its kernels"
    stand_ins: dict[str, dict[str, Any]] = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_split_conv1d_scan_combined": convolve_and_scan,
            "mamba_chunk_scan_combined": None,
        },
    }
    if importlib.util.find_spec("einops") is None:
        stand_ins["einops"] = {"rearrange": reorder_axes, "repeat": repeat_groups}
        # Gated delta nets have imported it, and so it has looked for einops.
        context = importlib.import_module("megatron.core.ssm.mamba_context_parallel")
        vars(context).update(repeat=repeat_groups, HAVE_EINOPS=True)
    held = {name: sys.modules.get(name) for name in stand_ins}
    for name, members in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        importlib.import_module(mixer)
    finally:
        # Others ask whether these are installed, and must not find empty ones.
        for name, module in held.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def convolve_and_scan(
    zxBCdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    D: Tensor,
    chunk_size: int,
    activation: str,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: None,
) -> Tensor:
    """Return Mamba-2's state space output, gated by z, [b, l, h p].

    zxBCdt: [b, l, 2 h p + 2 g n + h]; conv1d_weight: [h p + 2 g n, width]; A, D, dt_bias: [h].
    State h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, output y_t = C_t h_t + D x_t, written as
    attention: source: Dao and Gu, "Transformers are SSMs", 2024, section 5.
    """
    assert seq_idx is None
    assert not norm_before_gate
    assert activation == "silu"
    num_heads, length = len(A), zxBCdt.shape[1]
    inner = num_heads * headdim
    z, xBC, dt = zxBCdt.split([inner, len(conv1d_bias), num_heads], -1)
    xBC = torch.nn.functional.conv1d(
        xBC.mT,
        conv1d_weight[:, None],
        conv1d_bias,
        padding=conv1d_weight.shape[1] - 1,
        groups=len(conv1d_bias),
    )[..., :length].mT
    state = (len(conv1d_bias) - inner) // 2
    x, B, C = torch.nn.functional.silu(xBC).float().split([inner, state, state], -1)
    x = x.unflatten(-1, (num_heads, headdim))
    B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    decay = (dt * A).cumsum(1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[..., None]
    kept = (decay[:, :, None] - decay[:, None]).masked_fill(future, float("-inf")).exp()
    scores = torch.einsum("btgn,bsgn->btsg", C, B).repeat_interleave(num_heads // ngroups, -1)
    y = torch.einsum("btsh,bsh,bshp->bthp", scores * kept, dt, x) + D[:, None] * x
    return (y.flatten(2) * torch.nn.functional.silu(z)).to(zxBCdt.dtype)


class GatedNorm(torch.nn.Module):
    """RMSNorm over groups of columns, as mamba_ssm's without a gate."""

    def __init__(
        self, size: int, *, eps: float, group_size: int, norm_before_gate: bool, **factory: Any
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(size, **factory))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (-1, self.group_size))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2).to(x.dtype) * self.weight


def reorder_axes(x: Tensor, pattern: str) -> Tensor:
    """Do what einops' rearrange does for a pattern of axes of one letter, dropping ones."""
    before, after = (side.split() for side in pattern.split("->"))
    assert all(len(axis) == 1 for axis in before + after), pattern
    x = x.squeeze([index for index, axis in enumerate(before) if axis == "1"])
    named = "".join(axis for axis in before if axis != "1")
    return torch.einsum(f"{named}->{''.join(after)}", x)


def repeat_groups(x: Tensor, pattern: str, *, g: int, n: int, r: int) -> Tensor:
    """Do what einops' repeat does for the one pattern of training, under context parallelism."""
    assert pattern == "l b (g n) -> l b (g r n)", pattern
    return x.unflatten(-1, (g, n)).repeat_interleave(r, -2).flatten(-2)
