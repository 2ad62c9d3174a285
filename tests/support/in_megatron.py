"""What a forked process, which has Megatron imported, is called to do (`forked.call`).

Its module is imported there, so it must bring nothing that the process does not need.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalora.data.preferences import Pair


class Preferring(NamedTuple):
    """Of each step its metrics and the gradient's norm; the first gradient, the last adapters."""

    metrics: list[dict[str, float]]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


def prefer(directory: Path, pairs: Sequence[Pair]) -> Preferring:
    """Train the adapter in a directory, on the base there, to prefer chosen answers."""
    from tests.dist.support.dpo import from_hugging_face

    found = from_hugging_face(directory / "base", directory / "adapter", pairs)
    gradients, end = (
        {name: tensor.numpy() for name, tensor in tensors.items()}
        for tensors in (found.gradients, found.end)
    )
    return Preferring(found.metrics, found.norms, gradients, end)
