"""torch in place of TransformerEngine's CUDA kernels, where tests on the CPU have it installed.

A GPU has the kernels where it has these packages; where it has not, `megalora.mends` goes without.
"""

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

from megalora.mends.attention import core_attention
from megalora.mends.optimizer import ADAM
from megalora.replace import Patch, instead

PATCHES = (
    Patch(
        TESpecProvider,
        "core_attention",
        ("self",),
        instead(core_attention),
        "TransformerEngine's attention is a CUDA kernel",
    ),
    # TransformerEngine's, where that is installed, is a CUDA kernel too.
    *ADAM,
)
