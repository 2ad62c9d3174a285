"""The rules of "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025), as functions."""

import math
from dataclasses import dataclass, replace

from megalora.config import LoRAConfig
from megalora.model.families import rate_exponents
from megalora.model.shape import ModelShape
from megalora.recommend.costs import adapter_parameters

# rate = BASE_RATE * multiplier * (BASE_HIDDEN / hidden_size) ** exponent of the family, fitted by
# the article to Llama-3 and Qwen3 models (`megalora.model.families` has the exponents); the
# multiplier is 1 for full fine-tuning.
BASE_RATE, BASE_HIDDEN = 5e-5, 2000
LORA_MULTIPLIER, SHORT_RUN_MULTIPLIER, SHORT_RUN_STEPS = 10, 15, 100
RULE_ALPHA = 32

BITS_PER_PARAMETER = 2
BITS_PER_TOKEN = 1
BITS_PER_EPISODE = 1

# The article's supervised runs: no lasting gap to full fine-tuning at the first batch size, a
# lasting one at the second, at any rank.
SAFE_BATCH_SIZE, COSTLY_BATCH_SIZE = 32, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Constant learning rates, each a range (low, high); both ends are equal in a known family."""

    family: str
    multiplier: int
    full: tuple[float, float]
    lora: tuple[float, float]

    @property
    def known(self) -> bool:
        """Say whether the rule was fitted to this family."""
        return self.family in rate_exponents()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bits that the adapters can hold against bits that the data can teach.

    rank_needed: the smallest rank, doubling from the smallest possible, that holds them; None
    where none up to the hidden size does.
    """

    adapter_bits: float
    data_bits: float
    source: str
    rank_needed: int | None

    @property
    def low_regret(self) -> bool:
        """Say whether the adapters hold the data: LoRA then learns like full fine-tuning."""
        return self.data_bits <= self.adapter_bits


def learning_rates(hidden_size: int, family: str, *, steps: int | None = None) -> Rates:
    """Return the article's rates, for runs of fewer than 100 steps with a factor of 15 for 10.

    A family that the rule was not fitted to gets the range that the fitted ones span.
    """
    fitted = rate_exponents()
    exponents = [fitted[family]] if family in fitted else fitted.values()
    full = sorted(BASE_RATE * (BASE_HIDDEN / hidden_size) ** power for power in exponents)
    short = steps is not None and steps < SHORT_RUN_STEPS
    multiplier = SHORT_RUN_MULTIPLIER if short else LORA_MULTIPLIER
    low, high = full[0], full[-1]
    return Rates(
        family=family,
        multiplier=multiplier,
        full=(low, high),
        lora=(multiplier * low, multiplier * high),
    )


def data_bits(
    *,
    tokens: int | None = None,
    first_epoch_nats: float | None = None,
    rl_episodes: int | None = None,
) -> tuple[float, str] | None:
    """Bound the bits that the data can teach, and say by what; None where nothing is given.

    tokens: trained tokens of one epoch, about one bit each. first_epoch_nats: their summed loss in
    nats, a tighter bound. rl_episodes: about one bit each. Raises ValueError where supervised and
    reinforcement learning are mixed, or where a count is not positive.
    """
    given = {"tokens": tokens, "first_epoch_nats": first_epoch_nats, "rl_episodes": rl_episodes}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: it must be positive, or left out")
    if rl_episodes is not None and (tokens is not None or first_epoch_nats is not None):
        raise ValueError(
            f"rl_episodes is {rl_episodes} beside supervised data: size the two runs one by one"
        )
    if first_epoch_nats is not None:
        return first_epoch_nats / math.log(2), "summed loss of the first epoch"
    if tokens is not None:
        return float(BITS_PER_TOKEN * tokens), "trained tokens at about 1 bit"
    if rl_episodes is not None:
        return float(BITS_PER_EPISODE * rl_episodes), "episodes at about 1 bit"
    return None


def capacity(shape: ModelShape, config: LoRAConfig, bits: float, source: str) -> Capacity:
    """Compare the bits of the data with the adapters' two bits for each parameter."""
    return Capacity(
        adapter_bits=_adapter_bits(shape, config),
        data_bits=bits,
        source=source,
        rank_needed=_rank_needed(shape, config, bits),
    )


def effective_alpha(config: LoRAConfig) -> float:
    """Return the alpha of alpha / rank, which for rsLoRA is alpha sqrt(rank)."""
    return config.scale(config.rank) * config.rank


def two_number_basis(
    config: LoRAConfig, in_features: int, lr: float, lr_b: float | None = None
) -> tuple[float, float]:
    """Return (alpha init_A LR_B, init_A / LR_A), which alone decide training with Adam.

    The four of alpha, init_A, LR_A and LR_B have two invariances: alpha / (p q), p init_A, p LR_A,
    q LR_B train alike, given eps_A / p and eps_B / q. The first number is the size of the first
    update, the second the steps in which A leaves its start. init_A is the bound 1 / sqrt(in) of
    the uniform start. lr: of A. lr_b: by default that times lr_ratio.
    """
    init = 1 / math.sqrt(in_features)
    lr_b = lr * config.lr_ratio if lr_b is None else lr_b
    return effective_alpha(config) * init * lr_b, init / lr if lr else math.inf


def _adapter_bits(shape: ModelShape, config: LoRAConfig) -> float:
    return float(BITS_PER_PARAMETER * sum(adapter_parameters(shape, config).values()))


def _rank_needed(shape: ModelShape, config: LoRAConfig, bits: float) -> int | None:
    per_expert = config.expert_mode == "per_expert" and config.expert_rank is None
    has_experts = "experts" in adapter_parameters(shape, config)
    rank = shape.moe_router_topk if per_expert and has_experts else 1
    while rank <= shape.hidden_size:
        if _adapter_bits(shape, replace(config, rank=rank)) >= bits:
            return rank
        rank *= 2
    return None
