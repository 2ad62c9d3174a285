"""Experts that read and write a latent, without TransformerEngine (Nemotron 3 Super and Ultra).

Megatron's layer projects to that latent, and back, by TransformerEngine's linears alone.
"""

from collections.abc import Callable

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter, functional

from megalora.replace import Patch, instead


class LatentLinear(torch.nn.Module):
    """A linear that is whole on every rank, as TransformerEngine's is in the mode `duplicated`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        bias: bool,
        **_of_transformer_engine: object,
    ) -> None:
        super().__init__()
        on_cpu = config.use_cpu_initialization
        device = torch.device("cpu" if on_cpu else torch.cuda.current_device())
        options = {"device": device, "dtype": config.params_dtype}
        self.weight = Parameter(torch.empty(output_size, input_size, **options))
        self.bias = Parameter(torch.zeros(output_size, **options)) if bias else None
        if config.perform_initialization:
            init_method(self.weight)
        for parameter in self.parameters():
            # Each rank has the gradient of its own tokens.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return y [s, b, o] of x [s, b, i], and no bias that is left to add."""
        return functional.linear(x, self.weight, self.bias), None


PATCHES = (
    ()
    if te.HAVE_TE
    else (
        Patch(
            moe_layer,
            "HAVE_TE",
            None,
            instead(True),
            "without TransformerEngine experts have no latent",
        ),
        Patch(
            moe_layer,
            "TELinear",
            None,
            instead(LatentLinear),
            "experts' latents are projected by TransformerEngine's linears alone",
        ),
    )
)
