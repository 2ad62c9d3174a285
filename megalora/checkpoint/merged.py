"""The base with its adapters merged, as an ordinary Megatron checkpoint."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.training import checkpointing, get_args

from megalora.adapters.merge import merge
from megalora.checkpoint.base import changed


def save_merged(model_chunks: Sequence[torch.nn.Module], directory: str | os.PathLike[str]) -> None:
    """Merge the adapters and save the model as a release of weights, with checksums.

    Any Megatron run starts from it by --pretrained-checkpoint or --load. The model stays merged.
    All ranks must call it.
    """
    merge(model_chunks)
    weights_only = {
        "save": str(directory),
        "no_save_optim": True,
        "no_save_rng": True,
        "async_save": False,
        "verify_integrity": True,
        # A release has no iteration: runs that load it start at 0, with their first sample.
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
    }
    with changed(cast(Any, get_args()), weights_only), contextlib.ExitStack() as stack:
        for chunk in model_chunks:
            stack.enter_context(cast(Any, chunk).hide_loss_modules())
        checkpointing.save_checkpoint(0, list(model_chunks), None, None, 0, release=True)
