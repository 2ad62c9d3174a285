"""Start values of adapters, the same on every parallel layout, bit for bit."""

import hashlib
import math

import torch
from torch import Tensor

from megalora.adapters.factors import Sharding


def start_values(sharding: Sharding, name: str, seed: int) -> Tensor | float:
    """Return the first values of a factor of the adapter `name`, a tensor being this rank's shard.

    Every factor is drawn whole from a generator seeded by its global name and expert number, then
    sliced.
    """
    start, group = sharding.factor.start, sharding.expert_group
    if not callable(start):
        return start
    if not sharding.num_experts:
        return sharding.shard_features(start(name, sharding.shape, seed))
    first = 0 if group is None else sharding.num_experts * group.rank()
    experts = range(first, first + sharding.num_experts)
    drawn = [start(f"{name}.{expert}", sharding.shape, seed) for expert in experts]
    return sharding.shard_features(torch.stack(drawn))


def draw_uniform(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw an A [P r, d_in] in fp32 from U(-1/sqrt(d_in), 1/sqrt(d_in)), seeded by its name.

    These are the values that PEFT's kaiming_uniform_(a=sqrt(5)) has.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
