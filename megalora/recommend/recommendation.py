"""Put the rules and the costs together: one recommendation, as text and as JSON."""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from megalora.config import LoRAConfig
from megalora.model.families import rate_exponents
from megalora.model.megatron import args_shape
from megalora.model.presets import named_shape
from megalora.model.shape import ModelShape
from megalora.recommend.costs import (
    Flops,
    Layout,
    Memory,
    adapter_parameters,
    gpu_memory,
    step_flops,
)
from megalora.recommend.linears import Group, base_parameters
from megalora.recommend.rules import (
    COSTLY_BATCH_SIZE,
    RULE_ALPHA,
    SAFE_BATCH_SIZE,
    Capacity,
    Rates,
    capacity,
    data_bits,
    effective_alpha,
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
        rows = [*_model_rows(self), *_cost_rows(self)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, sizes in bytes."""
        room = self.capacity
        return {
            "model": _sizes(self.shape),
            "lora": self.config.to_dict(),
            "layout": asdict(self.layout) | {"num_gpus": self.layout.num_gpus},
            "trainable_parameters": {**self.parameters, "all": self.trainable},
            "learning_rate": {
                "family_known": self.rates.known,
                "multiplier": self.rates.multiplier,
                "lora": list(self.rates.lora),
                "full": list(self.rates.full),
            },
            "basis": None if self.basis is None else list(self.basis),
            "capacity": None if room is None else asdict(room) | {"low_regret": room.low_regret},
            "flops_per_token": asdict(self.flops) | {"ratio": self.flops.ratio},
            "memory_per_gpu": {
                "full": asdict(self.memory_full) | {"total": self.memory_full.total},
                "lora": asdict(self.memory_lora) | {"total": self.memory_lora.total},
            },
            "notes": list(self.notes),
        }


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
    notes = [
        *([f"adapters only as Megatron has them: {shape.unmapped}"] if shape.unmapped else []),
        *_rate_notes(rates, config),
        *_capacity_notes(room, config),
        *_batch_notes(_positive("batch_size", batch_size), rl_episodes),
    ]
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
        notes=tuple(notes),
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


# Names of sizes in JSON that are shorter than Megatron's.
_JSON_NAMES = {
    "num_moe_experts": "num_experts",
    "moe_shared_expert_intermediate_size": "shared_expert_size",
    "moe_shared_expert_gate": "shared_expert_gate",
    "gated_linear_unit": "gated",
    "qk_layernorm": "qk_norm",
    "add_qkv_bias": "qkv_bias",
    "tied_embeddings": "tied",
}


def _sizes(shape: ModelShape) -> dict[str, Any]:
    sizes = {_JSON_NAMES.get(name, name): value for name, value in asdict(shape).items()}
    del sizes["moe_layer_freq"]
    layers = {"dense_layers": shape.dense_layers}
    return {**sizes, **layers, "base_parameters": base_parameters(shape)}


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}: it must be at least 1, or left out")
    return value


def _rate_notes(rates: Rates, config: LoRAConfig) -> list[str]:
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


def _capacity_notes(room: Capacity | None, config: LoRAConfig) -> list[str]:
    if room is None:
        return ["give the data's size to compare it with the adapters' capacity"]
    if room.low_regret:
        return []
    if room.rank_needed is None:
        return ["no rank up to the hidden size holds this data: use full fine-tuning"]
    return [f"rank {config.rank} does not hold this data: use rank {room.rank_needed}"]


def _batch_notes(batch_size: int | None, rl_episodes: int | None) -> list[str]:
    # The article measured the penalty in supervised training only.
    if batch_size is None or batch_size <= SAFE_BATCH_SIZE or rl_episodes is not None:
        return []
    return [
        f"batch size {batch_size}: LoRA falls behind full fine-tuning in large batches, at any "
        f"rank (the article: no lasting gap at {SAFE_BATCH_SIZE}, a lasting one at "
        f"{COSTLY_BATCH_SIZE}): prefer {SAFE_BATCH_SIZE} or less"
    ]


def _model_rows(result: Recommendation) -> list[tuple[str, str]]:
    shape, config, rates = result.shape, result.config, result.rates
    adapters = f"rank {config.rank}, alpha {config.alpha:g}, {' '.join(config.targets)}"
    if "experts" in result.parameters:
        adapters += f", {config.expert_mode} of rank "
        adapters += str(config.resolve_expert_rank(shape.moe_router_topk))
    parts = [f"{group} {count:,}" for group, count in result.parameters.items()]
    share = result.trainable / base_parameters(shape)
    rows = [
        ("model", f"{shape.name}, {base_parameters(shape):,} parameters"),
        ("adapters", adapters),
        ("trainable", f"{result.trainable:,} ({share:.2%} of the base): {', '.join(parts)}"),
        (
            "learning rate",
            f"LoRA {_range(rates.lora)}, full fine-tuning {_range(rates.full)}, constant "
            f"({rates.multiplier} x, family {rates.family or 'unknown'})",
        ),
    ]
    if result.basis is not None:
        first, second = result.basis
        rows.append(("basis", f"alpha init_A LR_B {first:.3g}, init_A / LR_A {second:.3g} steps"))
    return rows


def _cost_rows(result: Recommendation) -> list[tuple[str, str]]:
    room, layout = result.capacity, result.layout
    rows = []
    if room is not None:
        regime = "low regret" if room.low_regret else "the adapters are too small"
        needed = "none" if room.rank_needed is None else str(room.rank_needed)
        rows.append(
            (
                "capacity",
                f"{_si(room.adapter_bits)}bit for {_si(room.data_bits)}bit of data "
                f"({room.source}): {regime}, smallest rank {needed}",
            )
        )
    gpus = f"{layout.num_gpus} GPU: tp {layout.tp}, ep {layout.ep}, pp {layout.pp}, dp {layout.dp}"
    return [
        *rows,
        ("FLOPs", f"{result.flops.ratio:.3f} of a full step, in the linears"),
        (
            "memory",
            f"LoRA {_gib(result.memory_lora)}, full fine-tuning {_gib(result.memory_full)}, "
            f"each GPU without activations ({gpus})",
        ),
    ]


def _range(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"


def _gib(memory: Memory) -> str:
    return f"{memory.total / 2**30:.3g} GiB"


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"
