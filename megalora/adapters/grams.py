"""Norms of thin factors and of their product, from Gram matrices as small as the rank.

A [r, i] and B [o, r] have the Gram matrices A Aᵀ and BᵀB, both [r, r], whatever i and o are. Those
of shards add up to those of the whole. Nothing here needs Megatron.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Of a factor that are turned into fp64 at a time: 64 MiB at rank 256.
_ROWS = 1 << 15


class Norms(NamedTuple):
    """Frobenius and spectral norms of factors and of B A, each [n] in fp64."""

    a: Tensor
    b: Tensor
    product: Tensor
    spectral_a: Tensor
    spectral_b: Tensor
    spectral_product: Tensor


def gram(columns: Tensor) -> Tensor:
    """Return XᵀX [..., r, r] in fp64 of X [..., n, r], some of its rows at a time."""
    total = columns.new_zeros((*columns.shape[:-2], columns.shape[-1], columns.shape[-1]))
    total = total.double()
    for part in columns.split(_ROWS, -2):
        wide = part.double()
        total += wide.mT @ wide
    return total


def norms(gram_a: Tensor, gram_b: Tensor) -> Norms:
    """Return the norms of pairs of factors; NaN where a factor is not finite.

    gram_a: A Aᵀ [n, r, r]. gram_b: BᵀB [n, r, r]. With A Aᵀ = S Sᵀ, B A has the singular values of
    B S, whose squares are the eigenvalues of Sᵀ BᵀB S: exact to rounding, not an iteration.
    """
    wrong_a, wrong_b = (~each.isfinite().all(-1).all(-1) for each in (gram_a, gram_b))
    gram_a = gram_a.masked_fill(wrong_a[:, None, None], 0)
    gram_b = gram_b.masked_fill(wrong_b[:, None, None], 0)
    values, vectors = torch.linalg.eigh(gram_a)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    product = root.mT @ gram_b @ root
    squares = [_trace(gram_a), _trace(gram_b), _trace(product)]
    squares += [values[:, -1], _largest(gram_b), _largest(product)]
    wrong = [wrong_a, wrong_b, wrong_a | wrong_b] * 2
    # Rounding may leave the square of a zero norm slightly negative.
    found = (each.clamp(min=0).sqrt() for each in squares)
    return Norms(*(x.masked_fill(w, torch.nan) for x, w in zip(found, wrong, strict=True)))


def _trace(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1).sum(-1)


def _largest(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric)[:, -1]
