"""A recommendation as text for a terminal and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megalora.model.shape import ModelShape
from megalora.printable import printable
from megalora.recommend.costs import Memory
from megalora.recommend.linears import base_parameters

if TYPE_CHECKING:
    from megalora.recommend.recommendation import Recommendation

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


def table(result: "Recommendation") -> str:
    """Return a recommendation as text for a terminal."""
    rows = [*_model_rows(result), *_cost_rows(result)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in result.notes)]))


def to_dict(result: "Recommendation") -> dict[str, Any]:
    """Return a recommendation as JSON-ready values, sizes in bytes."""
    room = result.capacity
    return {
        "model": _sizes(result.shape),
        "lora": result.config.to_dict(),
        "layout": asdict(result.layout) | {"num_gpus": result.layout.num_gpus},
        "trainable_parameters": {**result.parameters, "all": result.trainable},
        "learning_rate": {
            "family_known": result.rates.known,
            "multiplier": result.rates.multiplier,
            "lora": list(result.rates.lora),
            "full": list(result.rates.full),
        },
        "basis": None if result.basis is None else list(result.basis),
        "capacity": None if room is None else asdict(room) | {"low_regret": room.low_regret},
        "flops_per_token": asdict(result.flops) | {"ratio": result.flops.ratio},
        "memory_per_gpu": {
            "full": asdict(result.memory_full) | {"total": result.memory_full.total},
            "lora": asdict(result.memory_lora) | {"total": result.memory_lora.total},
        },
        "notes": list(result.notes),
    }


def _sizes(shape: ModelShape) -> dict[str, Any]:
    sizes = {_JSON_NAMES.get(name, name): value for name, value in asdict(shape).items()}
    del sizes["moe_layer_freq"]
    layers = {"dense_layers": shape.dense_layers}
    return {**sizes, **layers, "base_parameters": base_parameters(shape)}


def _model_rows(result: "Recommendation") -> list[tuple[str, str]]:
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
            f"({rates.multiplier} x, family {rates.family or 'unknown'}"
            f"{'' if rates.known else ', to which it was not fitted'})",
        ),
    ]
    if result.basis is not None:
        first, second = result.basis
        rows.append(("basis", f"alpha init_A LR_B {first:.3g}, init_A / LR_A {second:.3g} steps"))
    return rows


def _cost_rows(result: "Recommendation") -> list[tuple[str, str]]:
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
