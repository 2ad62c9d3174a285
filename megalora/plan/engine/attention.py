"""Core attention as shapes: flash attention (1, 2, 3 or cuDNN's), or all scores where flags ask.

Kept are queries, keys, values, the output and a number for each row of scores. Keys that several
heads share are not copied. FLOPs are those of the pairs that a mask leaves, half under a causal
one.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.plan.engine.base import Kept
from megalora.plan.engine.kernels import ops
from megalora.plan.engine.ring import Context

ALONE = Context("p2p", None, None)


class _Flash(torch.autograd.Function):
    """Attention of this rank's queries [..., heads, d] to all keys [..., groups, d].

    kept: what a mask or a bias has the kernel keep besides.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Kept, q: Tensor, k: Tensor, v: Tensor, pairs: int, context: Context, *kept: Tensor
    ) -> Tensor:
        q, k, v = context.exchange((q, k, v))
        passing = context.gather_keys((k, v))
        out, lse = ops.attention(q, k, v, pairs)
        del passing
        (given,) = context.exchange((out,))
        ctx.pairs, ctx.context = pairs, context
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return given

    @staticmethod
    def backward(ctx: Kept, d_out: Tensor):  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        context: Context = ctx.context
        (d_out,) = context.exchange((d_out,))
        passing = context.gather_keys((k, v))
        d_q, d_k, d_v, _workspace = ops.attention_backward(d_out, q, k, v, ctx.pairs)
        del passing, _workspace
        d_k, d_v = context.scatter_gradients((d_k, d_v))
        gradients = context.exchange((d_q, d_k, d_v))
        return *gradients, None, None, *[None] * (len(ctx.saved_tensors) - 5)


def flash(
    q: Tensor, k: Tensor, v: Tensor, pairs: int, context: Context = ALONE, *kept: Tensor
) -> Tensor:
    """Return the output, shaped as q with v's width; pairs: (query, key) of one head here."""
    return _Flash.apply(q, k, v, pairs, context, *kept)  # type: ignore[return-value]


def num_pairs(queries: int, keys: int, *, causal: bool, window: int = -1) -> int:
    """Return how many pairs a mask leaves of queries at the end of keys; window: keys before."""
    if window >= 0 and window < keys:
        return queries * window - (window * window // 2 if queries == keys else 0)
    return queries * keys // 2 if causal else queries * keys


class DotProductAttention(torch.nn.Module):
    """Stand where TransformerEngine's does."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        tp_size: int = 1,
        cp_group: ProcessGroup | list[ProcessGroup] | None = None,
        cp_comm_type: str = "p2p",
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        **_unused: object,
    ) -> None:
        super().__init__()
        self.attention_dropout, self.attn_mask_type = attention_dropout, attn_mask_type
        self.window_size = window_size
        self.return_max_logit = return_max_logit
        self.cp_comm_type = cp_comm_type
        self.set_context_parallel_group(cp_group, None, None, cp_comm_type)
        if softmax_type == "learnable":
            shape = num_attention_heads // tp_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(shape, device="cuda"))

    def set_context_parallel_group(
        self,
        cp_group: ProcessGroup | list[ProcessGroup] | None,
        cp_global_ranks: object,
        cp_stream: object,
        cp_comm_type: str = "p2p",
    ) -> None:
        """Set over which ranks sequences are cut."""
        if cp_group is None:
            self._context = ALONE
        elif isinstance(cp_group, list):
            inner, outer = cp_group
            self._context = Context(cp_comm_type, outer, inner)
        elif cp_comm_type == "a2a":
            self._context = Context(cp_comm_type, None, cp_group)
        else:
            self._context = Context(cp_comm_type, cp_group, None)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        attn_mask_type: str | None = None,
        core_attention_bias: Tensor | None = None,
        max_seqlen_kv: int | None = None,
        **_unused: object,
    ) -> Any:
        """Attend; returns [s, b, heads * d_v], or [t, heads * d_v] of packed sequences."""
        causal = "causal" in (attn_mask_type or self.attn_mask_type)
        q, k, v = (x.contiguous() for x in (query_layer, key_layer, value_layer))
        if is_unfused():
            out = _unfused(q, k, v, self.attention_dropout if self.training else 0.0)
        else:
            pairs = self._pairs(q, k, causal, None if qkv_format == "sbhd" else max_seqlen_kv)
            kept = () if core_attention_bias is None else (core_attention_bias,)
            out = flash(q, k, v, pairs, self._context, *kept)
        out = out.flatten(-2)
        return (out, out.new_empty(q.shape[-2])) if self.return_max_logit else out

    def _pairs(self, q: Tensor, k: Tensor, causal: bool, longest: int | None) -> int:
        batch = 1 if q.dim() == 3 else q.shape[1]
        keys = k.shape[0] * (1 if self._context is ALONE else self._context.size)
        window = -1 if self.window_size is None else self.window_size[0]
        seen = num_pairs(keys, min(keys, longest or keys), causal=causal, window=window)
        return batch * seen * q.shape[0] // keys


def is_unfused() -> bool:
    """Say whether `--attention-backend unfused` has all scores computed; Megatron sets these."""
    return os.environ.get("NVTE_FLASH_ATTN") == os.environ.get("NVTE_FUSED_ATTN") == "0"


class _Softmax(torch.autograd.Function):
    """Scaled, masked softmax in one kernel: keeps its output, and its gradient overwrites dy."""

    @staticmethod
    def forward(ctx: Kept, scores: Tensor) -> Tensor:  # type: ignore[override]
        probs = torch.empty_like(scores)
        ctx.save_for_backward(probs)
        return probs

    @staticmethod
    def backward(ctx: Kept, dy: Tensor):  # type: ignore[override]
        return dy


def _unfused(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return the output by way of all scores [b heads, s, s], keys copied for each head."""
    sharing = q.shape[-2] // k.shape[-2]
    if sharing > 1:
        k, v = (x.repeat_interleave(sharing, dim=-2) for x in (k, v))
    by_head = [x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 1) for x in (q, k, v)]
    scores = torch.bmm(by_head[0], by_head[1].transpose(1, 2))
    probs: Tensor = _Softmax.apply(scores)  # type: ignore[assignment]
    del scores
    if dropout > 0:
        probs, _mask = torch.native_dropout(probs, dropout, True)
    out = torch.bmm(probs, by_head[2])
    return out.transpose(0, 1).reshape(*q.shape[:-1], v.shape[-1])
