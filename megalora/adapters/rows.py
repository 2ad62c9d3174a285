"""The order of an output's rows (`targets.Rows`) in tensors: whole, on a rank, and as stored.

Tensor-parallel rank k holds a part of every block, as in [gate_k; up_k] or [z_k; x_k; B_k; C_k;
dt_k], which is no slice of the whole [gate; up] or [z; x; B; C; dt]. Whole tensors are in the order
of the whole; a checkpoint stores blocks so that they load on any number of ranks. `dim`, negative,
is the dimension of the rows everywhere. Nothing here needs Megatron.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalora.model.facts import DELTA_GATES, MAMBA_WIDE
from megalora.targets import Rows


def to_ranks(whole: Tensor, rows: Rows, tp_size: int, dim: int) -> Tensor:
    """Turn the rows of the whole into those of rank 0, 1, ..., so that a rank's are a slice."""
    if len(rows.blocks) == 1:
        return whole
    blocks = [block.unflatten(dim, (tp_size, -1)) for block in whole.split(rows.blocks, dim)]
    return torch.cat(blocks, dim).flatten(dim - 1, dim)


def to_whole(ranks: Tensor, rows: Rows, tp_size: int, dim: int) -> Tensor:
    """Turn the rows of rank 0, 1, ... into those of the whole; the inverse of `to_ranks`."""
    if len(rows.blocks) == 1:
        return ranks
    parts = ranks.unflatten(dim, (tp_size, -1)).split([n // tp_size for n in rows.blocks], dim)
    return torch.cat([part.flatten(dim - 1, dim) for part in parts], dim)


def to_stored(own: Tensor, rows: Rows, tp_size: int, dim: int) -> dict[str, Tensor]:
    """Return what a checkpoint has of a rank's rows, by what comes behind their key.

    Each part of named blocks is a tensor; of unnamed ones there is one, [..., blocks, o/t, ...].
    """
    if rows.names:
        parts = own.split([size // tp_size for size in rows.blocks], dim)
        return {f".{name}": part for name, part in zip(rows.names, parts, strict=True)}
    return {"": own.unflatten(dim, (len(rows.blocks), -1)) if len(rows.blocks) > 1 else own}


def from_stored(stored: Sequence[Tensor], dim: int, *, has_blocks: bool) -> Tensor:
    """Return the rows of what a checkpoint has, in order; the inverse of `to_stored`.

    has_blocks: whether unnamed blocks have a dimension of their own.
    """
    if len(stored) > 1:
        return torch.cat(list(stored), dim)
    return stored[0].flatten(dim - 1, dim) if has_blocks else stored[0]


def fit_padding(whole: Tensor, rows: Rows, dim: int) -> Tensor:
    """Trim or fill the rows of padding, where the whole is of another tensor-parallel size."""
    missing = rows.size - whole.shape[dim]
    if not rows.padded or missing == 0:
        return whole
    if missing < 0:
        return whole.narrow(dim, 0, rows.size)
    shape = list(whole.shape)
    shape[dim] = missing
    return torch.cat([whole, whole.new_zeros(shape)], dim)


def split_projections(values: Tensor, period: Sequence[int]) -> list[Tensor]:
    """Split rows [o, ...] into those of every projection, which alternate by `period`."""
    if not period:
        return [values]
    blocks = values.unflatten(0, (-1, sum(period))).split(list(period), 1)
    return [block.flatten(0, 1) for block in blocks]


def join_projections(values: Sequence[Tensor], period: Sequence[int]) -> Tensor:
    """Put the rows of every projection in their order; the inverse of `split_projections`."""
    if not period:
        return values[0]
    # A rank's one period may lack a projection.
    num = sum(own.shape[0] for own in values) // sum(period)
    blocks = [own.unflatten(0, (num, size)) for own, size in zip(values, period, strict=True)]
    return torch.cat(blocks, 1).flatten(0, 1)


# By the class of the module that a linear of several parts is in: names of the parts of its rows,
# in order, and their global sizes. Not by the class itself, which would import its kernels.
PARTS: dict[str, dict[str, Callable[[Any], int]]] = {
    "MambaMixer": {
        "z": lambda mixer: mixer.d_inner,
        "x": lambda mixer: mixer.d_inner,
        "B": lambda mixer: mixer.ngroups * mixer.d_state,
        "C": lambda mixer: mixer.ngroups * mixer.d_state,
        "dt": lambda mixer: mixer.nheads,
    },
    "GatedDeltaNet": {
        "query": lambda net: net.qk_dim,
        "key": lambda net: net.qk_dim,
        "value": lambda net: net.v_dim,
        "z": lambda net: net.v_dim,
        **dict.fromkeys(DELTA_GATES, lambda net: net.num_value_heads),
    },
    "FusedMLASelfAttention": {
        "q": lambda attention: attention.config.q_lora_rank,
        "kv": lambda attention: (
            attention.config.kv_lora_rank + attention.config.qk_pos_emb_head_dim
        ),
    },
}
# The parts that may be stored of one tensor: all that there are, or those that have adapters.
_ORDERS = (
    *map(tuple, PARTS.values()),
    tuple(part for part in PARTS["GatedDeltaNet"] if part not in DELTA_GATES),
    MAMBA_WIDE,
)
# The linears that have such parts.
IN_PARTS = ("in_proj", "linear_qkv_down_proj")


def parts_of(module: torch.nn.Module) -> dict[str, int] | None:
    """Return names and global sizes of the parts of what `IN_PARTS` names in a module."""
    for kind in type(module).__mro__:
        if parts := PARTS.get(kind.__name__):
            return {name: size(module) for name, size in parts.items()}
    return None


def whole_key(key: str) -> str:
    """Return the key of the tensor that a stored key is of, or is a part of."""
    tensor, _, part = key.rpartition(".")
    return tensor if any(part in parts for parts in PARTS.values()) else key


def stored_by_tensor(stored: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return what is stored of each whole tensor: its parts in their order, or the one that is."""
    found: dict[str, list[Tensor]] = {}
    for key in sorted({whole_key(key) for key in stored}):
        orders = [[f"{key}.{part}" for part in parts] for parts in _ORDERS]
        complete = (order for order in orders if all(name in stored for name in order))
        found[key] = [stored[name] for name in next(complete, [key])]
    return found
