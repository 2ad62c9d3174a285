"""Tokens drawn from logits, so that an answer depends on its own numbers and on no other answer."""

import random

import torch
from torch import Tensor


def uniforms(seed: int, dp_rank: int, indices: list[int], length: int) -> Tensor:
    """Return what decides answers: numbers in [0, 1), fp64 [len(indices), length].

    Each prompt has its own sequence, by the seed, the data-parallel rank and its index there. No
    global generator is used.
    """
    generators = [random.Random(f"{seed} {dp_rank} {index}") for index in indices]
    numbers = [[generator.random() for _ in range(length)] for generator in generators]
    return torch.tensor(numbers, dtype=torch.float64)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of each row at temperature 1: tokens int64 [b], log probabilities fp32 [b].

    logits: [b, v]; uniform: fp64 [b]. The token is the first whose cumulative probability exceeds
    the number (inversion), so logits that differ by rounding give the same token but at its edge.
    """
    logprobs = logits.float().log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Below the sum also where rounding would reach it: a token of probability 0 is never drawn.
    below = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, below, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
