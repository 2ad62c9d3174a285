"""The tiny launch script, into one step of which an infinity is put by hand, on one rank.

BREAK: the rank, the iteration, and a part of the name of a parameter, or of `main_grad of` one.
"""

import os

import pretrain_tiny
import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def forward_step(data_iterator, model, *more):
    rank, iteration, *of, wanted = os.environ["BREAK"].split()
    here = (torch.distributed.get_rank(), get_args().curr_iteration + 1)
    if here == (int(rank), int(iteration)):
        param = next(p for name, p in model.named_parameters() if wanted in name)
        with torch.no_grad():
            (param.main_grad if of else param).view(-1)[3] = float("inf")
    return pretrain_tiny.forward_step(data_iterator, model, *more)


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        pretrain_tiny.datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
