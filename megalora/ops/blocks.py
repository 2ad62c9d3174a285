"""Which rows and columns belong to which expert and projection, for the plain torch ops."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def owners(segments: Sequence[int], num_columns: int, device: torch.device) -> Tensor:
    """Return the index of the projection of each output column, int64 [num_columns]."""
    if not segments:
        return torch.zeros(num_columns, dtype=torch.int64, device=device)
    period = torch.arange(len(segments), device=device).repeat_interleave(
        torch.tensor(segments, device=device)
    )
    return period.repeat(num_columns // sum(segments))


def spread(lora_B: Tensor, segments: Sequence[int]) -> Tensor:
    """Return B as [..., out, P*r]: each row in the rank block of its projection, zero elsewhere."""
    num_columns = lora_B.shape[-2]
    owner = owners(segments, num_columns, lora_B.device)
    one_hot = torch.nn.functional.one_hot(owner, max(1, len(segments))).to(lora_B.dtype)
    return (one_hot[:, :, None] * lora_B[..., None, :]).flatten(-2)


def gather(full: Tensor, segments: Sequence[int]) -> Tensor:
    """Return [..., out, r] from [..., out, P*r]: each row's own rank block, as `spread` put it."""
    num_columns = full.shape[-2]
    owner = owners(segments, num_columns, full.device)
    blocks = full.unflatten(-1, (max(1, len(segments)), -1))
    return blocks[..., torch.arange(num_columns, device=full.device), owner, :]


def outer(left: Tensor, right: Tensor, offsets: Tensor | None) -> Tensor:
    """Return leftᵀ right over all rows, or of each expert over its own, [E, ...]."""
    if offsets is None:
        return left.mT @ right
    product = left.new_zeros(offsets.numel(), left.shape[1], right.shape[1])
    for expert, span in spans(offsets, left):
        product[expert] = left[span].mT @ right[span]
    return product


def spans(offsets: Tensor | None, tokens: Tensor) -> Iterator[tuple[int | slice, slice]]:
    """Yield (index into the weights, slice of rows): one for each expert, or one for all rows."""
    if offsets is None:
        yield slice(None), slice(0, tokens.shape[0])
        return
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        yield expert, slice(start, end)
        start = end


def flat(x: Tensor) -> Tensor:
    """Return [..., c] as [tokens, c]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def accumulated(x: Tensor) -> Tensor:
    """Return a tensor in the precision that sums are made in: fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return x matrix, [..., columns], of tokens of any number of dimensions."""
    found = flat(accumulated(x)) @ matrix
    # Not a view: whoever gets it may change it in place.
    return found.view(*x.shape[:-1], matrix.shape[1]).clone()
