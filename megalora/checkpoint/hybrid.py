"""Adapters that a GPT model saved load into the HybridModel that equals it, and the other way.

They have the same names and sizes (`megalora.model.hybrid`), while Megatron compares the models
around them, and would look for those of a GPT model under other names.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from megatron.training import checkpointing, get_args

from megalora.model.hybrid import as_gpt
from megalora.replace import Patch, around


def find_other_way(
    original: Callable[..., tuple[object, bool]],
    args: argparse.Namespace,
    ckpt_args: argparse.Namespace,
    model: Sequence[torch.nn.Module],
) -> tuple[object, bool]:
    """Say that nothing has to be renamed where adapters are loaded; Megatron's answer for bases."""
    if not args.finetune and hasattr(model[0], "megalora_description"):
        return None, False
    return original(args, ckpt_args, model)


def check_args(
    original: Callable[..., None],
    checkpoint_args: argparse.Namespace,
    skip_args: Collection[str] | None = None,
) -> None:
    """Let a HybridModel's number of layers be that of the GPT model that it equals."""
    skipped = set(skip_args or ())
    if _num_layers(checkpoint_args) == _num_layers(cast(argparse.Namespace, get_args())):
        skipped.add("num_layers")
    original(checkpoint_args, skip_args=skipped)


def _num_layers(args: argparse.Namespace) -> object:
    fields = as_gpt(vars(args), getattr(args, "hybrid_layer_pattern", None))
    return fields.get("num_layers")


PATCHES = (
    Patch(
        checkpointing,
        "_maybe_setup_gpt_to_hybrid_load",
        ("args", "ckpt_args", "model"),
        around(find_other_way),
        "adapters of a GPT model would be looked for under a base's names, those of a hybrid one "
        "refused",
    ),
    Patch(
        checkpointing,
        "check_checkpoint_args",
        ("checkpoint_args", "skip_args"),
        around(check_args),
        "a hybrid model has twice the layers of the GPT model that it equals",
    ),
)
