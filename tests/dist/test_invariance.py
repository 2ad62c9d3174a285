"""The four-parameter invariance of "LoRA Without Regret", in a real model trained with Adam."""

import functools
from typing import Any

import pytest
import torch

from megalora.builder import apply_lora, named_adapters
from megalora.config import LoRAConfig
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import SEQ_LENGTH, VOCAB_SIZE, build_model

NUM_STEPS = 40
LR, EPS = 3e-3, 1e-4
# Not powers of two, whose scaling rounds nothing.
P, Q = 3.0, 0.7
ALPHA = 32.0


@functools.cache
def losses(
    *, alpha: float, init: float, lr_ratio: float, lr: float, eps_a: float, eps_b: float
) -> torch.Tensor:
    """Train in fp64 and return the loss of each step; `init` multiplies the start of every A."""
    config = LoRAConfig(
        rank=4, alpha=alpha, lr_ratio=lr_ratio, eps_a=eps_a, eps_b=eps_b, ops="reference"
    )
    layout = Layout()
    with model_parallel(layout):
        (model,) = apply_lora([*build_model(layout, params_dtype=torch.float64)], config)
        model.double()
        optimizer = adam(model, config, lr, init)
        return torch.stack([step(model, optimizer, number) for number in range(NUM_STEPS)])


def adam(model: Any, config: LoRAConfig, lr: float, init: float) -> torch.optim.Adam:
    factors_a = [adapter.lora_A for _, adapter in named_adapters([model])]
    factors_b = [adapter.lora_B for _, adapter in named_adapters([model])]
    with torch.no_grad():
        for factor in factors_a:
            factor.mul_(init)
    return torch.optim.Adam(
        [
            {"params": factors_a, "lr": lr, "eps": config.eps_a},
            {"params": factors_b, "lr": lr * config.lr_ratio, "eps": config.eps_b},
        ],
        betas=(0.9, 0.95),
    )


def step(model: Any, optimizer: torch.optim.Adam, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number % 4)
    tokens = torch.randint(0, VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=generator)
    logits = model(tokens[:, :-1], torch.arange(SEQ_LENGTH)[None].expand(2, -1), None)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def plain() -> torch.Tensor:
    return losses(alpha=ALPHA, init=1.0, lr=LR, lr_ratio=1.0, eps_a=EPS, eps_b=EPS)


def moved(*, eps_a: float, eps_b: float) -> torch.Tensor:
    """Return the losses at alpha / (p q), p init_A, p LR_A, q LR_B."""
    return losses(
        alpha=ALPHA / (P * Q), init=P, lr=P * LR, lr_ratio=Q / P, eps_a=eps_a, eps_b=eps_b
    )


@over(Layout())
def test_moving_along_the_invariance_changes_no_loss(layout: Layout) -> None:
    difference = (moved(eps_a=EPS / P, eps_b=EPS / Q) - plain()).abs().max()
    assert difference < 1e-12
    assert plain()[0] - plain()[-1] > 0.5, "nothing was learned: the comparison is vacuous"


@over(Layout())
@pytest.mark.parametrize(
    "eps", [{"eps_a": EPS / Q, "eps_b": EPS / Q}, {"eps_a": EPS, "eps_b": EPS}], ids=["1/q", "same"]
)
def test_one_epsilon_for_both_factors_breaks_it(layout: Layout, eps: dict[str, float]) -> None:
    # The article's footnote scales one common epsilon by 1/q, which leaves A's wrong.
    assert (moved(**eps) - plain()).abs().max() > 1e-2


@over(Layout())
def test_moving_one_parameter_alone_changes_the_loss(layout: Layout) -> None:
    other = losses(alpha=ALPHA / P, init=1.0, lr=LR, lr_ratio=1.0, eps_a=EPS, eps_b=EPS)
    assert (other - plain()).abs().max() > 1e-2
