"""Which modules get which adapter: pure planning, without process groups or tensors."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megalora.config import LoRAConfig

ATTENTION = (
    "linear_qkv",
    "linear_proj",
    "linear_q",
    "linear_kv",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "linear_qkv_down_proj",
)
MLP = ("linear_fc1", "linear_fc2")
MAMBA = ("in_proj", "out_proj")
PRESETS: dict[str, tuple[str, ...]] = {
    "attn": ATTENTION,
    "mlp": MLP,
    "mamba": MAMBA,
    "unembed": ("output_layer",),
    "all": (*ATTENTION, *MLP, *MAMBA, "output_layer"),
}
ADAPTABLE = (*PRESETS["all"], "router", "eh_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The sizes of a model that decide the form of its adapters.

    moe_layer_freq: 0 or 1 for each layer, or 1 for experts in all of them.
    hybrid_layer_pattern: kinds of a HybridModel's layers, without pipeline stages; empty for GPT.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    gated_linear_unit: bool
    attention_output_gate: bool = False
    moe_router_topk: int = 1
    num_moe_experts: int = 0
    moe_layer_freq: int | Sequence[int] = 1
    q_lora_rank: int = 0
    hybrid_layer_pattern: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The form of one adapter, sizes global.

    name: global module name of the base, such as `decoder.layers.3.mlp.linear_fc1`.
    rank: rank r of one projection; lora_A stacks num_projections of them.
    segments: sizes of one period of output columns, block p belonging to projection p; empty
        where one A serves all columns.
    gated: output is [gate; up], of which a rank owns [gate_k; up_k].
    parts: sizes of blocks of output rows of which a rank owns a part each (`adapters.rows`);
        empty where a rank owns a slice of the whole.
    shared_a, shared_b: the factor is one over all experts (`shared_outer`).
    """

    name: str
    rank: int
    scale: float
    num_projections: int = 1
    segments: tuple[int, ...] = ()
    gated: bool = False
    parts: tuple[int, ...] = ()
    shared_a: bool = False
    shared_b: bool = False

    @property
    def adapter_name(self) -> str:
        """Global name of the adapter, a sibling of its base."""
        return self.name + "_lora"

    @property
    def is_unembedding(self) -> bool:
        """Whether its output columns are the vocabulary, padding included."""
        return self.name.endswith("output_layer")


def matching_target(name: str, targets: Iterable[str]) -> str | None:
    """Return the first target that selects a global module name, None where none does.

    A target is a preset, a module name (`linear_fc1`, `shared_experts.linear_fc1`), or a pattern
    with `*` over the whole name.
    """
    leaf = name.rpartition(".")[2]
    for target in targets:
        if leaf in PRESETS.get(target, ()):
            return target
        if name == target or name.endswith("." + target) or fnmatchcase(name, target):
            return target
    return None


def check_targets(targets: Iterable[str]) -> None:
    """Raise ValueError where a target can name nothing that has an adapter."""
    for target in targets:
        leaf = target.rpartition(".")[2]
        if target in PRESETS or "*" in target or leaf in ADAPTABLE:
            continue
        raise ValueError(
            f"lora_targets has {target!r}, which has no adapter: use presets "
            f"{sorted(PRESETS)}, or module names {sorted(ADAPTABLE)}"
        )


def check_all_matched(
    targets: Iterable[str], matched: Iterable[str], adaptable: Iterable[str]
) -> None:
    """Raise ValueError where a target selected no module of the whole model.

    adaptable: last parts of the names of all modules that an adapter could go to.
    """
    missing = sorted(set(targets) - set(matched))
    if not missing:
        return
    has = ", ".join(sorted(adaptable)) or "none that an adapter could go to: leave --lora-rank out"
    raise ValueError(
        f"lora_targets {missing} match no module of this model; its linears are {has}. "
        f"Presets are {sorted(PRESETS)}"
    )


def plan(
    name: str,
    out_features: int,
    config: LoRAConfig,
    facts: ModelFacts,
    *,
    is_expert: bool,
    parts: tuple[int, ...] = (),
) -> AdapterSpec:
    """Return the form of the adapter of the base linear with this global name."""
    leaf = name.rpartition(".")[2]
    rank = config.resolve_expert_rank(facts.moe_router_topk) if is_expert else config.rank
    gated = leaf == "linear_fc1" and facts.gated_linear_unit
    segments = () if config.shared_a else _segments(leaf, out_features, facts, gated=gated)
    shared = is_expert and config.expert_mode == "shared_outer"
    return AdapterSpec(
        name=name,
        rank=rank,
        scale=config.scale(rank),
        num_projections=max(1, len(segments)),
        segments=segments,
        gated=gated,
        parts=parts,
        shared_a=shared and leaf == "linear_fc1",
        shared_b=shared and leaf == "linear_fc2",
    )


def local_segments(
    segments: tuple[int, ...], out_features: int, *, gated: bool, tp_rank: int, tp_size: int
) -> list[int]:
    """Return the segments of one rank's output columns.

    Whole periods where a rank owns some; else the part of its one period that a rank owns (fewer
    query groups than ranks).
    """
    if not segments:
        return []
    if gated:
        return [size // tp_size for size in segments]
    period, width = sum(segments), out_features // tp_size
    if width % period == 0:
        return list(segments)
    start = tp_rank * width % period
    if start + width > period:
        raise ValueError(
            f"{width} output columns of rank {tp_rank} cross a query group of {period} columns: "
            "use a tensor-parallel size that divides num_query_groups or is a multiple of it"
        )
    sizes, begin = [], 0
    for size in segments:
        overlap = min(start + width, begin + size) - max(start, begin)
        sizes.append(max(0, overlap))
        begin += size
    return sizes


def global_name(name: str, layer_numbers: dict[str, int]) -> str:
    """Turn a stage's module name into the model's: layer indices become global, from 0.

    layer_numbers: stage prefix such as `decoder.layers.1` -> Megatron's layer_number (from 1).
    """
    found = re.match(r"(.*?layers)\.(\d+)(?=\.|$)", name)
    if found is None or found.group(0) not in layer_numbers:
        return name
    return f"{found.group(1)}.{layer_numbers[found.group(0)] - 1}{name[found.end() :]}"


def _segments(leaf: str, out_features: int, facts: ModelFacts, *, gated: bool) -> tuple[int, ...]:
    if gated:
        return (out_features // 2, out_features // 2)
    if leaf == "linear_qkv":
        heads = facts.num_attention_heads // facts.num_query_groups
        # An output gate's rows belong to the query projection.
        query = heads * facts.kv_channels * (2 if facts.attention_output_gate else 1)
        return (query, facts.kv_channels, facts.kv_channels)
    if leaf == "linear_kv":
        return (facts.kv_channels, facts.kv_channels)
    if leaf == "linear_qkv_down_proj":
        return (facts.q_lora_rank, out_features - facts.q_lora_rank)
    return ()
