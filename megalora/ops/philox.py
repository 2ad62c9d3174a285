"""Say in plain torch which elements dropout keeps, on any device: a word of Philox for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return four 32-bit words for each 64-bit counter by Philox4x32-10.

    counter: int64 [n], the low half of the 128-bit counter. key: int64 [1].
    Result: int64 [n, 4] in [0, 2^32).
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    words = [counter & WORD, (counter >> 32) & WORD, counter * 0, counter * 0]
    keys = [key & WORD, (key >> 32) & WORD]
    for _ in range(10):
        low, high = (m * w for m, w in zip(PHILOX_MULTIPLIERS, words[::2], strict=True))
        words = [
            ((high >> 32) & WORD) ^ words[1] ^ keys[0],
            high & WORD,
            ((low >> 32) & WORD) ^ words[3] ^ keys[1],
            low & WORD,
        ]
        keys = [(k + step) & WORD for k, step in zip(keys, PHILOX_KEY_STEPS, strict=True)]
    return torch.stack(words, dim=-1)


def dropout_mask(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """Return True for kept elements: those whose Philox word is at least p * 2^32.

    Element e, counted row-major over the whole tensor, has word e % 4 of counter e // 4.
    """
    count = torch.Size(shape).numel()
    counter = torch.arange((count + 3) // 4, device=seed.device)
    return (philox(counter, seed).flatten()[:count] >= int(p * 2**32)).view(*shape)
