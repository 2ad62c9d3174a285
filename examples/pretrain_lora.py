"""Fine-tune a Megatron model with LoRA: an ordinary Megatron launch script, to be copied.

torchrun --nproc-per-node 8 examples/pretrain_lora.py <any Megatron flags> --lora-rank 32

Without a CUDA device, or with --cpu, it runs on the CPU over gloo. Without --lora-rank it trains
the whole model, as any Megatron script does.
"""

import argparse
import sys

from megalora import add_lora_args, launch

launch.prepare_megatron(sys.argv)  # before the first import of megatron

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megalora.data import add_data_args, check_data_args  # noqa: E402
from megalora.data.batch import datasets_provider, forward_step  # noqa: E402


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flags to Megatron's."""
    parser.add_argument("--cpu", action="store_true", help="run on the CPU over gloo")
    return launch.add_exchange_args(add_data_args(add_lora_args(parser)))


def main() -> None:
    """Build the model with its adapters, train it, export the adapter where that is asked for."""
    with launch.clear_errors():
        sys.argv[1:] = launch.with_hf_flags(sys.argv[1:])
        args = parse_and_validate_args(extra_args_provider=add_args)
        launch.check_training_args(args)
        lora = launch.LoRARun(args)
        check_data_args(args)
        with launch.at_end(lora.finish):
            pretrain(
                pretrain_cfg_container_from_args(args, lora.model_config()),
                datasets_provider,
                ModelType.encoder_or_decoder,
                forward_step,
            )


if __name__ == "__main__":
    main()
