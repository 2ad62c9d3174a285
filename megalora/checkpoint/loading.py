"""What Megatron loads in a run of adapters, kept from running what a checkpoint brings.

It reads `--load`, `--pretrained-checkpoint` and `--use-checkpoint-args` itself, on every rank.
"""

import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.safe_globals import SafeUnpickler
from megatron.training import checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megalora.checkpoint import hybrid
from megalora.checkpoint.unpickle import PICKLES, cause_of, load_object, unsafe, wanted
from megalora.replace import Patch, around


def load_base_checkpoint(
    original: Callable[..., tuple[Any, ...]],
    load_dir: str | None,
    *args: object,
    **kwargs: object,
) -> tuple[Any, ...]:
    """Raise ValueError for a pickle that is refused inside of checkpointing._load_base_checkpoint.

    Megatron prints it, and leaves with exit code 0, for a whole model that --ckpt-format torch
    saved; torch wraps it otherwise.
    """
    try:
        found = original(load_dir, *args, **kwargs)
    except CheckpointException as error:
        cause = cause_of(error)
        if isinstance(cause, ValueError):
            raise ValueError(f"checkpoint {load_dir}: {cause}") from error
        raise
    except pickle.UnpicklingError as error:
        raise unsafe(f"{COMMON_STATE_FNAME} of checkpoint {load_dir}", wanted(error)) from error
    except SystemExit as end:
        if end.__context__ is None:
            raise
        name = f"model_optim_rng.pt of checkpoint {load_dir}"
        if isinstance(end.__context__, pickle.UnpicklingError):
            raise unsafe(name, wanted(end.__context__)) from end
        raise ValueError(f"{name} cannot be read: {end.__context__}") from end
    _check_extra_states(found[0], load_dir)
    return found


def _check_extra_states(state: object, load_dir: str | None) -> None:
    """Raise ValueError for the FP8 state of a layer that is not what Megatron writes.

    A layer of TransformerEngine would unpickle it; no other does.
    """
    if "transformer_engine" not in sys.modules or not isinstance(state, dict):
        return
    for _, key, value in nested_items_iter(state):
        if "_extra_state" in str(key):
            name = f"{key} in checkpoint {load_dir}"
            try:
                _try_extra_state(value, name)
            except Exception as error:
                raise unsafe(name, wanted(error)) from error


def _try_extra_state(value: object, name: str) -> None:
    if isinstance(value, torch.Tensor) and value.numel():
        SafeUnpickler(io.BytesIO(value.detach().cpu().numpy().tobytes())).load()
    elif isinstance(value, io.BytesIO):
        value.seek(0)
        load_object(value, name)


LOADING = (
    *PICKLES,
    *hybrid.PATCHES,
    Patch(
        checkpointing,
        "_load_base_checkpoint",
        ("load_dir",),
        around(load_base_checkpoint),
        "a refused file ends the run with exit code 0; layers of TransformerEngine unpickle",
    ),
)
