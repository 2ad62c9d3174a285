"""Choose the implementation of the LoRA ops: `fused` (C++ and CUDA) or `reference` (plain torch).

Both have the functions of `protocol.Ops`.
"""

import os

from megalora.ops import fused, reference
from megalora.ops.protocol import Ops

__all__ = ["ENVIRONMENT", "Ops", "backend"]

ENVIRONMENT = "MEGALORA_OPS"


def backend(name: str) -> Ops:
    """Return the ops called `fused` or `reference`; MEGALORA_OPS in the environment overrides.

    The compiled library is loaded here, not on import: `reference` works where nothing is built.
    """
    name = os.environ.get(ENVIRONMENT) or name
    if name == "fused":
        return fused.load()
    if name == "reference":
        return reference
    raise ValueError(f"ops backend {name!r} is unknown: use 'fused' or 'reference'")
