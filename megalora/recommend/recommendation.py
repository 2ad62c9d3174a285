"""Put the rules and the costs together: one recommendation."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from megalora.config import LoRAConfig
from megalora.model.arguments import args_shape
from megalora.model.families import rate_exponents
from megalora.model.presets import named_shape
from megalora.model.shape import ModelShape
from megalora.recommend.costs import (
    Flops,
    Memory,
    adapter_parameters,
    gpu_memory,
    step_flops,
)
from megalora.recommend.layout import Layout
from megalora.recommend.linears import Group
from megalora.recommend.notes import batch_notes, capacity_notes, exchange_notes, rate_notes
from megalora.recommend.output import table, to_dict
from megalora.recommend.rules import (
    Capacity,
    Rates,
    capacity,
    data_bits,
    learning_rates,
    two_number_basis,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What a run should use and what it costs.

    parameters: trainable parameters for each group. capacity: None where the data is not given.
    basis: (alpha init_A LR_B, init_A / LR_A) at the hidden size; None in an unknown family and for
        PiSSA, whose start the rule does not cover.
    memory_full, memory_lora: bytes on the fullest GPU. notes: what the user should know or change.
    """

    shape: ModelShape
    config: LoRAConfig
    layout: Layout
    parameters: dict[Group, int]
    rates: Rates
    basis: tuple[float, float] | None
    capacity: Capacity | None
    flops: Flops
    memory_full: Memory
    memory_lora: Memory
    notes: tuple[str, ...]

    @property
    def trainable(self) -> int:
        """Count all trainable parameters."""
        return sum(self.parameters.values())

    @property
    def learning_rate(self) -> float:
        """Return the LoRA learning rate; ValueError where the family is unknown."""
        if not self.rates.known:
            low, high = self.rates.lora
            known = " and ".join(rate_exponents())
            raise ValueError(
                f"lr is auto, but the rule was fitted to {known}, and the model's family is "
                f"{self.rates.family or 'unknown'}: name the one that it is built like by "
                f"--lora-family, or sweep --lr around {low:.2e} to {high:.2e}"
            )
        return self.rates.lora[0]

    def table(self) -> str:
        """Return everything as text for a terminal."""
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, sizes in bytes."""
        return to_dict(self)


def recommend(
    shape: ModelShape,
    config: LoRAConfig,
    *,
    tokens: int | None = None,
    first_epoch_nats: float | None = None,
    rl_episodes: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    layout: Layout | None = None,
) -> Recommendation:
    """Apply the article's rules to a model and an adapter configuration.

    tokens, first_epoch_nats, rl_episodes: the data, see `rules.data_bits`. steps: length of the
    run. batch_size: sequences in an optimizer step. layout: Megatron's parallel sizes, default one
    GPU. Raises ValueError where the model, the targets, the ranks or the layout do not go together.
    """
    layout = layout or Layout()
    rates = learning_rates(shape.hidden_size, shape.family, steps=_positive("steps", steps))
    bits = data_bits(tokens=tokens, first_epoch_nats=first_epoch_nats, rl_episodes=rl_episodes)
    room = None if bits is None else capacity(shape, config, *bits)
    covered = rates.known and config.init == "uniform"
    return Recommendation(
        shape=shape,
        config=config,
        layout=layout,
        parameters=adapter_parameters(shape, config),
        rates=rates,
        basis=two_number_basis(config, shape.hidden_size, rates.lora[0]) if covered else None,
        capacity=room,
        flops=step_flops(shape, config),
        memory_full=gpu_memory(shape, None, layout),
        memory_lora=gpu_memory(shape, config, layout),
        notes=(
            *exchange_notes(shape),
            *rate_notes(rates, config),
            *capacity_notes(room, config),
            *batch_notes(_positive("batch_size", batch_size), rl_episodes),
        ),
    )


def recommend_for_args(
    args: argparse.Namespace, config: LoRAConfig, *, family: str = ""
) -> Recommendation:
    """Apply the rules to a training run's parsed Megatron arguments.

    The model is that of `args.hf_model` where there is one. family: the learning rate rule's, where
    the sizes do not tell.
    """
    if getattr(args, "hf_model", None):
        shape = named_shape(args.hf_model, family=family)
        shape = replace(shape, mtp_num_layers=getattr(args, "mtp_num_layers", None) or 0)
    else:
        shape = args_shape(args, family=family)
    samples, batch_size = getattr(args, "train_samples", None), args.global_batch_size
    return recommend(
        shape,
        config,
        steps=samples // batch_size if samples else args.train_iters or None,
        batch_size=batch_size,
        layout=Layout.from_megatron_args(args),
    )


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, or left out")
    return value
