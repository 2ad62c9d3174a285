"""Bases whose experts are MXFP4, by plain torch; nothing here needs transformers."""

from collections.abc import Callable

import torch
from torch import Tensor

CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, Tensor]


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [E, out, in / 32, 16] and scales [E, out, in / 32] of a weight [E, in, out]."""
    blocks = weight.float().mT.unflatten(-1, (-1, 32))
    # The largest of a block is not above 6, the largest code.
    scales = (blocks.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    distances = (blocks / scales.exp2()[..., None]).abs()[..., None] - torch.tensor(MAGNITUDES)
    codes = distances.abs().argmin(-1) + 8 * blocks.signbit()
    return (codes[..., ::2] + 16 * codes[..., 1::2]).byte(), (scales + 127).byte()


def in_mxfp4(tensors: Tensors) -> Tensors:
    """Store the experts of a model as gpt-oss is published."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERTS):
            found[f"{name}_blocks"], found[f"{name}_scales"] = packed(tensor)
        else:
            found[name] = tensor
    return found


def without(name: str) -> Callable[[Tensors], Tensors]:
    """Return what leaves a tensor out."""
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}
