"""The numbers of MXFP4: codes e2m1, two a byte, times a scale e8m0 of each 32 of them.

Source of the format: OCP Microscaling Formats (MX) v1.0, sections 5.3.3, 5.4.1 and 6.3.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from megalora.model.mxfp4 import BLOCK

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = (*_POSITIVE, *(-value for value in _POSITIVE))


def numbers_of(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers in bfloat16, which has all of them exactly.

    codes: [..., blocks, 16] uint8; scales: [..., blocks] uint8; returns [..., blocks * 32]. Of the
    two in a byte the first is in the low half. The scale 255 is NaN.
    """
    pairs = torch.tensor(
        [(_CODES[byte & 15], _CODES[byte >> 4]) for byte in range(256)], dtype=torch.bfloat16
    )
    numbers = embedding(codes.int(), pairs).view(*scales.shape, BLOCK)
    numbers *= scales.view(torch.float8_e8m0fnu).bfloat16()[..., None]
    return numbers.flatten(-2)
