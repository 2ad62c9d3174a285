"""Data parallelism that shards parameters is refused by name, before anything is built."""

import os
import sys

import pytest

from tests.support.forked import call
from tests.support.tiny import LORA, MODEL, TRAIN

MEGATRON = ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"]
TORCH = ["--use-torch-fsdp2"]


def refusal(flags: list[str]) -> str:
    """Return what a run with these flags is told once Megatron itself has found them right."""
    from megatron.training.arguments import parse_and_validate_args

    from megalora import add_lora_args, launch

    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # which Megatron FSDP asks for
    sys.argv = ["train.py", *MODEL, *TRAIN, "--train-iters", "1", *flags]
    args = parse_and_validate_args(
        extra_args_provider=lambda parser: launch.add_exchange_args(add_lora_args(parser)),
        args_defaults={"tokenizer_type": "NullTokenizer"},
    )
    try:
        launch.LoRARun(args)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("flags", [MEGATRON, TORCH], ids=lambda flags: flags[0])
def test_fully_sharded_data_parallelism_is_refused_by_name(flags: list[str]) -> None:
    assert f"leave out {flags[0]}" in call(refusal, [*flags, *LORA])


def test_without_lora_it_is_left_to_megatron() -> None:
    assert call(refusal, TORCH) == ""
