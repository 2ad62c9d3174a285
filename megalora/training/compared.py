"""Where Megatron's start compares what its ranks were given, and what they read."""

import functools
import os
from collections.abc import Callable, Sequence

from megatron.core import parallel_state
from megatron.training import global_vars, training

from megalora.replace import Patch, around
from megalora.training import agree, fingerprints


def initialize_groups(original: Callable[..., None], *args: object, **kwargs: object) -> None:
    """Let ranks that were started with other flags end before they wait for each other."""
    # Megatron's own tests, and others that start no run, have none.
    given = global_vars._GLOBAL_ARGS
    if given is not None:
        agree.check(
            fingerprints.of_start(given, os.environ),
            "start all ranks with the same flags, environment and packages",
        )
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
