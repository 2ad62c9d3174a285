"""Start values of adapters, the same on every parallel layout, bit for bit."""

import hashlib
import math

import torch
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.collectives import own_shard


def reset_parameters(adapter: LoRAAdapter) -> None:
    """Draw A from U(-1/sqrt(d_in), 1/sqrt(d_in)) with the global d_in, set B to zero.

    These are the values that PEFT's kaiming_uniform_(a=sqrt(5)) has. Every A is drawn whole from a
    generator seeded by its global name and expert number, then sliced.
    """
    with torch.no_grad():
        adapter.lora_B.zero_()
        adapter.lora_A.copy_(own_shard(_draw(adapter), -1, adapter.a_group))


def _draw(adapter: LoRAAdapter) -> Tensor:
    if not adapter.a_experts:
        return draw_uniform(adapter.spec.adapter_name, adapter.a_shape(), adapter.config.seed)
    group = adapter.expert_group
    first = 0 if group is None else group.rank() * adapter.a_experts
    shape, seed, name = adapter.a_shape()[1:], adapter.config.seed, adapter.spec.adapter_name
    return torch.stack(
        [draw_uniform(f"{name}.{first + e}", shape, seed) for e in range(adapter.a_experts)]
    )


def draw_uniform(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw an A [P r, d_in] in fp32 from U(-1/sqrt(d_in), 1/sqrt(d_in)), seeded by its name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
