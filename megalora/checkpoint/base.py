"""The frozen base of a run: loading it, and telling whether it is the one that was trained on."""

import argparse
import contextlib
import functools
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.training import checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megalora import replace
from megalora.adapters.finite import all_finite, refuse
from megalora.adapters.world import summed, union
from megalora.checkpoint.layout import base_directory, find_directory
from megalora.checkpoint.loading import LOADING
from megalora.checkpoint.sums import verify_on_all_ranks
from megalora.config import is_number
from megalora.model.hybrid import equals_gpt, gpt_name, pattern_in

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
        # Before all of it is read: another node may not see the directory.
        verify_on_all_ranks(base_directory(Path(directory)))
    # What --finetune means: weights only, from iteration 0.
    as_finetuning = {
        "finetune": True,
        "pretrained_checkpoint": directory,
        "ckpt_step": step,
        "non_persistent_ckpt_type": None,
    }
    try:
        with changed(args, as_finetuning), _by_stored_names(model_chunks, Path(directory)):
            checkpointing.load_checkpoint(
                list(model_chunks), None, None, load_arg="pretrained_checkpoint"
            )
    # CheckpointException is what torch makes of an error while it plans or reads.
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"pretrained_checkpoint {directory!r} does not fit the model: {reason}"
        ) from error


@contextlib.contextmanager
def _by_stored_names(model_chunks: Sequence[torch.nn.Module], root: Path) -> Iterator[None]:
    """Let Megatron read a base by the names that its checkpoint has.

    It finds a GPT model's layers for a hybrid model itself where all are in one tensor, as they are
    where all are alike; else these have numbers.
    """
    pattern, finding = next(map(pattern_in, model_chunks), ""), dict[str, Any]()
    if equals_gpt(pattern) and _numbers_gpt_layers(find_directory(root)):
        finding = {"_maybe_setup_gpt_to_hybrid_load": lambda *_: (None, False)}
    names = functools.partial(gpt_name, pattern=pattern if finding else None)
    reading = {"load": functools.partial(_load_by_stored_names, names)}
    with changed(dist_checkpointing, reading), changed(checkpointing, finding):
        yield


def _numbers_gpt_layers(directory: Path) -> bool:
    """Say whether a checkpoint is a GPT model's with names of its own for each layer."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return False
    stored = load_sharded_metadata(str(directory))
    numbered = any(key.startswith("decoder.layers.0.") for key in stored)
    return numbered and "decoder.final_layernorm.weight" in stored


def _load_by_stored_names(
    names: Callable[[str], str],
    state_dict: dict[str, Any],
    checkpoint_dir: str,
    *rest: Any,
    **options: Any,
) -> object:
    """Load a checkpoint that the other kind of layers saved: Megatron's own, TransformerEngine's.

    It may lack TransformerEngine's `_extra_state`, which holds FP8 statistics and nothing else:
    they are left out. And the norm before experts has another name in each kind of layer.
    names: gives the name that a checkpoint has for a model's.
    """
    for value in nested_values(state_dict):
        if isinstance(value, ShardedBase):
            value.key = names(value.key)
    stored = load_sharded_metadata(checkpoint_dir)
    objects = {value.unique_key for value in stored.values() if isinstance(value, ShardedObject)}

    def is_absent(value: object) -> bool:
        return (
            isinstance(value, ShardedObject)
            and value.key.endswith("_extra_state")
            and value.unique_key not in objects
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
    it, before adapters are attached. Raises ValueError on all of them, naming families, where any
    weight, the vocabulary's too, is NaN or infinite.
    """
    own, dtypes = _own_sums(model_chunks)
    families = sorted(union(set(own), dist.group.WORLD))
    sums = [own.get(family, [0, 0.0, 0.0]) for family in families]
    totals = summed(torch.tensor(sums, dtype=torch.float64)).tolist()
    weights = dict(zip(families, totals, strict=True))
    # In fp64 the sums of finite weights are finite.
    refuse(
        {family for family, sums in weights.items() if not all(map(math.isfinite, sums))},
        "base has NaN or infinite weights in {}: give another --pretrained-checkpoint or "
        "--hf-model, or copy this one again from where it is intact".format,
    )
    return {
        "dtypes": sorted(union(dtypes, dist.group.WORLD)),
        "weights": {
            family: [int(count), total, math.sqrt(square)]
            for family, (count, total, square) in weights.items()
            if count
        },
    }


def _own_sums(model_chunks: Sequence[torch.nn.Module]) -> tuple[dict[str, list[float]], set[str]]:
    """Return count, sum and sum of squares of this rank's part of each family, and its precisions.

    Of what has padded rows, nothing is counted, and the sum is NaN where an element is not finite.
    """
    own: dict[str, list[float]] = {}
    dtypes, pattern = set(), pattern_in(model_chunks[0])
    for tensor in _main_shards(model_chunks):
        key = gpt_name(tensor.key, pattern)
        family = re.sub(r"\.\d+(?=\.)|(?<=weight)\d+$", "", key)
        assert tensor.data is not None
        data = tensor.data.detach()
        total = own.setdefault(family, [0, 0.0, 0.0])
        if tensor.allow_shape_mismatch:
            total[1] += 0.0 if all_finite(data) else math.nan
            continue
        total[0] += data.numel()
        total[1] += float(data.sum(dtype=torch.float64))
        total[2] += float(torch.linalg.vector_norm(data, dtype=torch.float64)) ** 2
        dtypes.add(str(data.dtype).removeprefix("torch."))
    return own, dtypes


def differences(stored: object, own: Mapping[str, Any]) -> list[str]:
    """Return how two fingerprints differ, a text for each family of weights that does.

    own: of `fingerprint`. stored: from a file; what is no fingerprint there is a difference too.
    """
    there_all = stored.get("weights") if isinstance(stored, Mapping) else None
    if not isinstance(stored, Mapping) or not isinstance(there_all, Mapping):
        return [f"the checkpoint's fingerprint of its base is {reprlib.repr(stored)}"]
    same_dtype = stored.get("dtypes") == own["dtypes"]
    tolerance = _TOLERANCE if same_dtype else _TOLERANCE_OTHER_DTYPE
    found = []
    for family in sorted({*there_all, *own["weights"]}):
        if family not in there_all or family not in own["weights"]:
            has = "the other" if family in there_all else "this"
            found.append(f"{family} is in {has} base only")
            continue
        here, there = own["weights"][family], there_all[family]
        if not _is_fingerprint(there):
            found.append(f"{family} is {reprlib.repr(there)} there: no count, sum and norm")
        elif here[0] != there[0]:
            found.append(f"{family} has {here[0]:,.0f} elements here and {there[0]:,.0f} there")
        elif any(not abs(here[i] - there[i]) <= tolerance * max(there[2], 1e-30) for i in (1, 2)):
            found.append(
                f"{family} has norm {here[2]:.6g} and sum {here[1]:.6g} here, "
                f"{there[2]:.6g} and {there[1]:.6g} there"
            )
    return found


def _is_fingerprint(values: object) -> bool:
    """Say whether what a file has for a family is a count, a sum and a norm."""
    if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
        return False
    return values[0] >= 0 and values[2] >= 0


def _main_shards(model_chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Yield this rank's shards such that all ranks together have every element once."""
    for tensor in shards(model_chunks):
        data = cast(torch.Tensor, tensor.data)
        if is_main_replica(tensor.replica_id) and data.is_floating_point():
            yield tensor


def shards(model_chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Yield what a checkpoint knows this rank's tensors by, replicas too."""
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    for chunk in model_chunks:
        state: dict[str, Any] = {"model": chunk.sharded_state_dict(metadata=metadata)}  # type: ignore[operator]
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and isinstance(tensor.data, torch.Tensor):
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
