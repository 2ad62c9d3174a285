"""What a recommendation tells the user to know or to change."""

from megalora.config import LoRAConfig
from megalora.model.families import rate_exponents
from megalora.model.shape import ModelShape
from megalora.recommend.rules import (
    COSTLY_BATCH_SIZE,
    RULE_ALPHA,
    SAFE_BATCH_SIZE,
    Capacity,
    Rates,
    effective_alpha,
)


def exchange_notes(shape: ModelShape) -> list[str]:
    """Say that the model's weights cannot be exchanged with Hugging Face, and why."""
    if not shape.unmapped:
        return []
    return [f"--hf-model cannot load this model's weights: {shape.unmapped}"]


def rate_notes(rates: Rates, config: LoRAConfig) -> list[str]:
    """Say where the learning rate rule does not hold, and what would train alike."""
    notes = []
    if not rates.known:
        notes.append(
            f"the learning rate rule was fitted to {' and '.join(rate_exponents())}, not to "
            f"{rates.family or 'this model, whose family is unknown'}: the range spans those "
            "families, sweep it"
        )
    alpha = effective_alpha(config)
    if alpha != RULE_ALPHA and alpha * config.lr_ratio != RULE_ALPHA:
        notes.append(
            f"the rule holds for alpha / rank with alpha {RULE_ALPHA}, here alpha is {alpha:g}: "
            f"--lora-lr-ratio {RULE_ALPHA / alpha:g} trains alike"
        )
    if config.init != "uniform":
        notes.append(f"the rule holds for a uniform start, not for {config.init}: sweep the rate")
    return notes


def capacity_notes(room: Capacity | None, config: LoRAConfig) -> list[str]:
    """Say which rank the data needs where this one is too small."""
    if room is None:
        return ["give the data's size to compare it with the adapters' capacity"]
    if room.low_regret:
        return []
    if room.rank_needed is None:
        return ["no rank up to the hidden size holds this data: use full fine-tuning"]
    return [f"rank {config.rank} does not hold this data: use rank {room.rank_needed}"]


def batch_notes(batch_size: int | None, rl_episodes: int | None) -> list[str]:
    """Say that LoRA falls behind in large batches, where this one is."""
    # The article measured the penalty in supervised training only.
    if batch_size is None or batch_size <= SAFE_BATCH_SIZE or rl_episodes is not None:
        return []
    return [
        f"batch size {batch_size}: LoRA falls behind full fine-tuning in large batches, at any "
        f"rank (the article: no lasting gap at {SAFE_BATCH_SIZE}, a lasting one at "
        f"{COSTLY_BATCH_SIZE}): prefer {SAFE_BATCH_SIZE} or less"
    ]
