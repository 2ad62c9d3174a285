"""The gated delta rule, and what is around it in its layer, in plain torch.

They are what `fla` (flash-linear-attention) has as kernels of GPUs. Nothing here needs Megatron.
cu_seqlens: where packed sequences start, and where the last one ends, [sequences + 1]; None for one
sequence per row of the batch. No state passes from one sequence to the next.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return what the queries read of a state that every token decays and corrects, in its order.

    With a state S [d_k, d_v] for each head, 0 at first, token t does

        S <- exp(decay_t) S,  S <- S + beta_t k_t (v_t - S' k_t)',  and reads  S' q_t / sqrt(d_k)

    query and key: [b, s, heads, d_k], value: [b, s, heads, d_v], decay (at most 0) and beta:
    [b, s, heads]. Returns [b, s, heads, d_v] in the values' precision; sums are in fp32 or better.
    The chunked form: Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv:2412.06464, 3.3.
    """
    chunks = _Chunks(value, cu_seqlens)
    q, k, v = chunks.cut(query) * query.shape[-1] ** -0.5, chunks.cut(key), chunks.cut(value)
    rate, total = chunks.cut(beta).unsqueeze(-1), chunks.cut(decay).cumsum(-1).unsqueeze(-1)
    # From token j of a chunk to token i; nothing goes back.
    back = total.new_ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool).triu(1)
    between = (total - total.mT).masked_fill(back, float("-inf")).exp()
    # What each token adds, were the state before its chunk 0, and what it takes of that state.
    system = rate * between * (k @ k.mT)
    both = torch.cat([rate * v, rate * total.exp() * k], -1)
    both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    added, taken = both.split([v.shape[-1], k.shape[-1]], -1)
    last = total[..., -1:, :]
    carried, kept = (last - total).exp() * k, last.exp()
    seen, q = between * (q @ k.mT), total.exp() * q
    state, out = last, []
    for i, is_first in enumerate(chunks.begin):
        if is_first:
            state = added.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
        new = added[:, :, i] - taken[:, :, i] @ state
        out.append(q[:, :, i] @ state + seen[:, :, i] @ new)
        state = kept[:, :, i] * state + carried[:, :, i].mT @ new
    return chunks.join(out).to(value.dtype)


class _Chunks:
    """Tokens in chunks of one size, of which every sequence begins one.

    begin: of each chunk, whether a sequence begins with it.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        lengths = [x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        places: list[int] = []
        self.begin: list[bool] = []
        for length in lengths:
            start = len(self.begin) * CHUNK_SIZE
            places.extend(range(start, start + length))
            self.begin.extend(i == 0 for i in range(-(-length // CHUNK_SIZE)))
        self._places = torch.tensor(places, device=x.device)

    def cut(self, x: Tensor) -> Tensor:
        """Return [b, heads, chunks, chunk, ...] of x [b, s, heads, ...], 0 behind a sequence."""
        precision = torch.promote_types(x.dtype, torch.float32)
        shape = (x.shape[0], len(self.begin) * CHUNK_SIZE, *x.shape[2:])
        whole = x.new_zeros(shape, dtype=precision).index_copy(1, self._places, x.to(precision))
        return whole.transpose(1, 2).unflatten(2, (-1, CHUNK_SIZE))

    def join(self, chunks: Sequence[Tensor]) -> Tensor:
        """Return [b, s, heads, d] of chunks [b, heads, chunk, d]."""
        return torch.cat(list(chunks), 2).transpose(1, 2).index_select(1, self._places)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Return silu of each channel's sum over the last tokens of its own sequence.

    x: [b, s, d]; weight: [d, width], its last column for the token itself; bias: [d].
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    tokens, taps = x.to(precision), weight.to(precision)
    out = tokens * taps[:, -1]
    position = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(x.device, torch.long)
        position = position - starts[torch.bucketize(position, starts[1:], right=True)]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        before = F.pad(tokens[:, :-back], (0, 0, back, 0))
        inside = (position >= back).unsqueeze(-1)
        out = out + torch.where(inside, before, 0) * taps[:, -1 - back]
    out = out if bias is None else out + bias.to(precision)
    return F.silu(out).to(x.dtype)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return vectors [..., d] of length 1, as far as eps lets short ones be."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return (precise * torch.rsqrt(precise.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
