"""Where Megatron's start compares what its ranks were given, and what they read."""

import argparse
import functools
import os
from collections.abc import Callable, Sequence

from megatron.core import parallel_state
from megatron.training import global_vars, training

from megalora.replace import Patch, around
from megalora.training import agree, fingerprints

# What the one run of this process was given, before Megatron derives more of it.
_given: dict[str, str] = {}


def remember(args: argparse.Namespace) -> None:
    """Keep the flags as they were parsed, to be compared once ranks can."""
    _given.update(fingerprints.of_flags(args))


def initialize_groups(original: Callable[..., None], *args: object, **kwargs: object) -> None:
    """Let ranks that were started with other flags end before they wait for each other."""
    # None where a script starts no run.
    parsed = global_vars._GLOBAL_ARGS
    if parsed is not None:
        agree.check(_given, "start all ranks with the same flags")
        software = fingerprints.of_software(os.environ)
        agree.check(software, "give every node the same packages and environment")
        agree.check(fingerprints.of_flags(parsed), "start all ranks with the same flags")
    original(*args, **kwargs)


def build_data_loaders(
    original: Callable[[object], tuple[object, ...]],
    build_train_valid_test_datasets_provider: Callable[..., Sequence[object]],
) -> tuple[object, ...]:
    """Let ranks that read other data end before they train on it."""
    built: list[object] = []

    @functools.wraps(build_train_valid_test_datasets_provider)
    def provide(*args: object, **kwargs: object) -> Sequence[object]:
        datasets = build_train_valid_test_datasets_provider(*args, **kwargs)
        built.extend(datasets)
        return datasets

    loaders = original(provide)
    agree.check(fingerprints.of_data(built), "give every node the same data and tokenizer")
    return loaders


PARSING = (
    Patch(
        parallel_state,
        "initialize_model_parallel",
        ("tensor_model_parallel_size",),
        around(initialize_groups),
        "ranks with other flags wait for each other, or train other models",
    ),
)

TRAINING = (
    Patch(
        training,
        "build_train_valid_test_data_loaders",
        ("build_train_valid_test_datasets_provider",),
        around(build_data_loaders),
        "ranks that read other data train on it",
    ),
)
