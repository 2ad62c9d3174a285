"""The frozen base of a run: loading it, and telling whether it is the one that was trained on."""

import argparse
import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import load as _load
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.training import checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megalora import replace
from megalora.checkpoint.layout import TRACKER, find_directory, verify_on_all_ranks
from megalora.checkpoint.loading import LOADING

# Of a family's norm. Sums are in fp64, so layouts differ by rounding alone; rounding to another
# precision moves a sum by about 2e-3 of the norm.
_TOLERANCE = 1e-6
_TOLERANCE_OTHER_DTYPE = 1e-2
# Of the norm before experts, in TransformerEngine's layers and in Megatron's own.
_NORM_NAMES = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def load_base(
    model_chunks: Sequence[torch.nn.Module],
    directory: str,
    args: argparse.Namespace,
    *,
    step: int | None = None,
    is_verified: bool = False,
) -> None:
    """Load a Megatron checkpoint of the base into chunks that have no adapters yet.

    Megatron's own loader reads it, of any format and layout that it knows. step: the iteration,
    None for the newest. is_verified: its checksums have been looked at. All ranks must call it.
    Raises ValueError where its files are damaged or do not fit the model.
    """
    replace.install(LOADING)
    if not is_verified:
        _verify(Path(directory))
    # What --finetune means: weights only, from iteration 0.
    as_finetuning = {
        "finetune": True,
        "pretrained_checkpoint": directory,
        "ckpt_step": step,
        "non_persistent_ckpt_type": None,
    }
    reading = {"load": _load_by_stored_names}
    with changed(args, as_finetuning), changed(dist_checkpointing, reading):
        try:
            checkpointing.load_checkpoint(
                list(model_chunks), None, None, load_arg="pretrained_checkpoint"
            )
        # CheckpointException is what torch makes of an error while it plans or reads.
        except (CheckpointException, CheckpointingException, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"pretrained_checkpoint {directory!r} does not fit the model: {reason}"
            ) from error


def _verify(root: Path) -> None:
    # Before rank 0 reads all of it: another node may not see the directory.
    directory = find_directory(root)
    if directory == root:
        raise ValueError(
            f"pretrained_checkpoint {str(root)!r} has no {TRACKER}: give the directory that a "
            "Megatron run saved its checkpoints in"
        )
    verify_on_all_ranks(directory)


def _load_by_stored_names(
    state_dict: dict[str, Any], checkpoint_dir: str, *rest: Any, **options: Any
) -> object:
    """Load a checkpoint that the other kind of layers saved: Megatron's own, TransformerEngine's.

    It may lack TransformerEngine's `_extra_state`, which holds FP8 statistics and nothing else:
    they are left out. And the norm before experts has another name in each kind of layer.
    """
    stored = load_sharded_metadata(checkpoint_dir)
    names = {value.unique_key for value in stored.values() if isinstance(value, ShardedObject)}

    def is_absent(value: object) -> bool:
        return (
            isinstance(value, ShardedObject)
            and value.key.endswith("_extra_state")
            and value.unique_key not in names
        )

    _, present = extract_matching_values(state_dict, is_absent)
    for value in nested_values(present):
        if isinstance(value, ShardedTensor) and value.key not in stored:
            value.key = next(filter(stored.__contains__, _other_names(value.key)), value.key)
    return _load(cast(dict[str, Any], present), checkpoint_dir, *rest, **options)


def _other_names(key: str) -> list[str]:
    one, other = _NORM_NAMES
    return [key.replace(one, other), key.replace(other, one)]


def fingerprint(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return numbers that tell one base from another and are the same on every parallel layout.

    For each family of weights, such as `decoder.layers.mlp.linear_fc1.weight`: how many elements
    its layers and experts have in all, their sum and their norm, in fp64. Weights with padded rows
    (the vocabulary's) are left out, because the padding depends on the layout. All ranks must call
    it, before adapters are attached.
    """
    own: dict[str, list[float]] = {}
    dtypes = set()
    for tensor in _main_shards(model_chunks):
        family = re.sub(r"\.\d+(?=\.)|(?<=weight)\d+$", "", tensor.key)
        assert tensor.data is not None
        data = tensor.data.detach()
        total = own.setdefault(family, [0, 0.0, 0.0])
        total[0] += data.numel()
        total[1] += float(data.sum(dtype=torch.float64))
        total[2] += float(torch.linalg.vector_norm(data, dtype=torch.float64)) ** 2
        dtypes.add(str(data.dtype).removeprefix("torch."))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, dtypes))
    weights: dict[str, list[float]] = {}
    for part, _ in gathered:
        for family, values in part.items():
            total = weights.setdefault(family, [0, 0.0, 0.0])
            total[:] = [a + b for a, b in zip(total, values, strict=True)]
    return {
        "dtypes": sorted(set().union(*(found for _, found in gathered))),
        "weights": {
            family: [count, total, math.sqrt(square)]
            for family, (count, total, square) in sorted(weights.items())
        },
    }


def differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return how two fingerprints differ, a text for each family of weights that does."""
    same_dtype = stored["dtypes"] == own["dtypes"]
    tolerance = _TOLERANCE if same_dtype else _TOLERANCE_OTHER_DTYPE
    found = []
    for family in sorted({*stored["weights"], *own["weights"]}):
        here, there = own["weights"].get(family), stored["weights"].get(family)
        if here is None or there is None:
            found.append(f"{family} is in {'the other' if here is None else 'this'} base only")
        elif here[0] != there[0]:
            found.append(f"{family} has {here[0]:,.0f} elements here and {there[0]:,.0f} there")
        elif any(abs(here[i] - there[i]) > tolerance * max(there[2], 1e-30) for i in (1, 2)):
            found.append(
                f"{family} has norm {here[2]:.6g} and sum {here[1]:.6g} here, "
                f"{there[2]:.6g} and {there[1]:.6g} there"
            )
    return found


def _main_shards(model_chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Yield this rank's shards such that all ranks together have every element once."""
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    for chunk in model_chunks:
        state: dict[str, Any] = {"model": chunk.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
        apply_factories(state)
        for tensor in nested_values(state):
            if (
                isinstance(tensor, ShardedTensor)
                and is_main_replica(tensor.replica_id)
                and not tensor.allow_shape_mismatch
                and isinstance(tensor.data, torch.Tensor)
                and tensor.data.is_floating_point()
            ):
                yield tensor


@contextlib.contextmanager
def changed(args: argparse.Namespace | ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    """Give Megatron's flags, or a module, other values for a while."""
    before = {name: getattr(args, name, None) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
