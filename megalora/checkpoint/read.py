"""Reading adapter checkpoints without a model: whole tensors and what is stored with them."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megalora.adapters.factors import from_checkpoint
from megalora.adapters.kinds import kind_named
from megalora.adapters.rows import whole_key
from megalora.checkpoint import unpickle
from megalora.checkpoint.description import parse_description, read_config, read_facts
from megalora.checkpoint.layout import METADATA, find_directory, verify
from megalora.checkpoint.unpickle import load_object
from megalora.config import LoRAConfig
from megalora.targets import ModelFacts, is_adapter_key

# Key of the adapters' description in a checkpoint's common state.
DESCRIPTION = "megalora"


Adapters = tuple[dict[str, Tensor], LoRAConfig, ModelFacts]


class Reader(FileSystemReader):
    """torch's reader, without the pickles that can run code. Raises ValueError for one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._metadata = unpickle.read_metadata(self)

    def read_metadata(self) -> Metadata:
        """Return what the checkpoint holds."""
        return self._metadata


class Planner(DefaultLoadPlanner):
    """torch's planner, without the pickles that can run code."""

    load_bytes = unpickle.load_bytes


def read_adapter_checkpoint(directory: str | Path) -> Adapters:
    """Read an adapter checkpoint without its base: unsharded tensors, configuration, model sizes.

    directory: a checkpoint's own, or one that holds latest_checkpointed_iteration.txt. Raises
    ValueError where a file is not what was saved, or where it is no adapter checkpoint.
    """
    path = find_directory(Path(directory))
    verify(path)
    return read_adapters(path)


def read_adapters(path: Path) -> Adapters:
    """Read the adapters of a checkpoint's own directory, whose files are verified already."""
    described = read_description(path)
    if described is None:
        raise ValueError(f"{path} has no adapters: it is not a checkpoint that megalora wrote")
    config, facts = read_config(described), read_facts(described)
    stored = read_tensors(path, lambda key: is_adapter_key(whole_key(key)) and _is_weight(key))
    with _reading(path):
        return from_checkpoint(stored, kind_named(config.kind).factors, facts), config, facts


def read_tensors(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read whole tensors of an iteration's directory by key, without any process group."""
    with _reading(directory):
        reader = Reader(directory)
        stored = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and wanted(key)
        }
        load(tensors, storage_reader=reader, planner=Planner(), no_dist=True)
    return tensors


def read_description(directory: Path) -> dict[str, Any] | None:
    """Return what is stored with the adapters in an iteration's directory.

    `config`: LoRAConfig's fields, `model`: ModelFacts', `hugging_face`: of `describe_model`, and
    `base`: of `describe_base`, where they were called; `distributed_optimizer`: whether its
    optimizer is one, None where it has none; `schedule`: the scheduler's state, or None;
    `random_states`: whether it has them. None for a checkpoint of a whole model. Raises ValueError
    where it cannot be read.
    """
    with _reading(directory):
        is_distributed = dist_checkpointing.check_is_distributed_checkpoint(str(directory))
        description = _describe(read_common(directory)) if is_distributed else None
    if not is_distributed:
        if any(directory.glob("mp_rank_*")) or (directory / METADATA).is_file():
            return None
        raise ValueError(
            f"{directory} is not a Megatron checkpoint: give what --save of a training run named"
        )
    return description


def _describe(common: dict[str, Any]) -> dict[str, Any] | None:
    for key, part in common.items():
        if _is_model(key) and DESCRIPTION in part:
            return {
                **parse_description(part[DESCRIPTION]),
                "distributed_optimizer": _optimizer(common),
                "schedule": common.get("opt_param_scheduler"),
                # Of a training run: what `megalora import` writes has no flags of one.
                "random_states": not getattr(common.get("args"), "no_save_rng", True),
            }
    return None


def read_common(directory: Path) -> dict[str, Any]:
    """Return what is no tensor of any rank, as Megatron's load_common_state_dict does."""
    if (directory / COMMON_STATE_FNAME).is_file():
        return load_object(directory / COMMON_STATE_FNAME, COMMON_STATE_FNAME)
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    state: dict[str, Any] = {key: io.BytesIO()}
    load(state, storage_reader=Reader(directory), planner=Planner(), no_dist=True)
    return state[key][0]


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Raise ValueError for what damaged files without checksums lead to, whatever it is."""
    try:
        yield
    # torch's CheckpointException is no Exception; its text is a traceback.
    except CheckpointException as error:
        cause = unpickle.cause_of(error)
        raise ValueError(f"checkpoint {directory} cannot be read: {cause}") from error
    except Exception as error:
        raise ValueError(f"checkpoint {directory} cannot be read: {error}") from error


def _optimizer(common: dict[str, Any]) -> bool | None:
    if "optimizer" not in common:
        return None
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    return "distrib_optim_sharding_type" in content


def _is_model(key: object) -> bool:
    return isinstance(key, str) and key.startswith("model")


def _is_weight(key: str) -> bool:
    """Tell a weight from its optimizer states."""
    return not key.startswith("optimizer")
