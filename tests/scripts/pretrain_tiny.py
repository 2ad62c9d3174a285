"""A launch script of the shape of Megatron-LM's pretrain_gpt.py, on random tokens.

It knows nothing of megalora: `megalora run` runs it, or plain Python does.
"""

from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


class RandomTokens(torch.utils.data.Dataset):
    """Sequences that are drawn from their number alone."""

    def __init__(self, num_samples, seq_length, vocab_size):
        self.num_samples, self.seq_length, self.vocab_size = num_samples, seq_length, vocab_size

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(int(index))
        size = (self.seq_length + 1,)
        return {"tokens": torch.randint(self.vocab_size, size, generator=generator)}


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    sizes = (args.seq_length, args.vocab_size)
    return tuple(RandomTokens(number, *sizes) if number else None for number in num_samples)


datasets_provider.is_distributed = True


def loss_func(output):
    loss = output.float().sum()
    num_tokens = torch.tensor(output.numel(), dtype=torch.int)
    report = torch.stack([loss.detach(), num_tokens.float()])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model, return_schedule_plan=False):
    tokens = next(data_iterator)["tokens"]
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    run_model = model.build_schedule_plan if return_schedule_plan else model
    return run_model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), partial(loss_func)


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
