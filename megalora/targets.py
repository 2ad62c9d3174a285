"""Which modules get which adapter: pure planning, without process groups or tensors."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megalora.config import LoRAConfig
from megalora.model.facts import DELTA_GATES, MAMBA_WIDE, ModelFacts

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
# Of Mamba-2 and of gated delta nets, by the module that they are in.
PROJECTIONS = ("in_proj", "out_proj")
MAMBA = tuple(f"mixer.{name}" for name in PROJECTIONS)
DELTA_NET = tuple(f"self_attention.{name}" for name in PROJECTIONS)
ALL = (*ATTENTION, *DELTA_NET, *MLP, *MAMBA, "output_layer")
# Thinking Machines' service leaves out what expands a latent, and of Mamba-2's in_proj all but
# z and x, which have an A each, by the sizes that it publishes.
EXPANDING = ("linear_q_up_proj", "linear_kv_up_proj")
TINKER = "tinker"
PRESETS: dict[str, tuple[str, ...]] = {
    "attn": (*ATTENTION, *DELTA_NET),
    "mlp": MLP,
    "mamba": MAMBA,
    "unembed": ("output_layer",),
    "all": ALL,
    TINKER: tuple(name for name in ALL if name not in EXPANDING),
}
# Behind the name of its base in an adapter's.
ADAPTER_SUFFIX = "_lora"
ADAPTABLE = (*ATTENTION, *MLP, *PROJECTIONS, "output_layer", "router", "eh_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How the rows of an output [o, ...] are ordered, whole and on a tensor-parallel rank.

    What it means for tensors is in `adapters.rows`. A base may have more rows than its adapter:
    those without come last on every rank.

    blocks: sizes of the blocks that the whole consists of; a rank owns a part of each, one after
        the other: gate and up of a gated linear, the parts of Mamba's in_proj, else one block.
    names: the blocks' names where a checkpoint stores each by itself; blocks without names are of
        one size, and a checkpoint stores them as one tensor with a dimension for them.
    period: sizes of one period of rows, block p of every period belonging to projection p; empty
        where one A serves all rows.
    padded: the last rows are padding, whose number follows the tensor-parallel size.
    """

    blocks: tuple[int, ...]
    names: tuple[str, ...] = ()
    period: tuple[int, ...] = ()
    padded: bool = False

    @property
    def size(self) -> int:
        """Number of rows of the whole."""
        return sum(self.blocks)

    @property
    def num_projections(self) -> int:
        """Number of Hugging Face projections that own rows."""
        return max(1, len(self.period))

    @property
    def by_projection(self) -> list[int]:
        """Number of rows of each projection, in all its periods."""
        return [self.size * size // sum(self.period) for size in self.period] or [self.size]

    def segments(self, tp_rank: int, tp_size: int) -> list[int]:
        """Return the sizes of one period of a rank's rows, empty where one A serves them all.

        Whole periods where a rank owns some; else the part of its one period that a rank owns
        (fewer query groups than ranks). Raises ValueError where its rows cross two periods.
        """
        if len(self.blocks) > 1:
            return [size // tp_size for size in self.period]
        period, width = sum(self.period), self.size // tp_size
        if not period or width % period == 0:
            return list(self.period)
        start = tp_rank * width % period
        if start + width > period:
            raise ValueError(
                f"{width} output columns of rank {tp_rank} cross a query group of {period} "
                "columns: use a tensor-parallel size that divides num_query_groups or is a "
                "multiple of it"
            )
        ends = list(itertools.accumulate(self.period))
        return [
            max(0, min(start + width, end) - max(start, end - size))
            for size, end in zip(self.period, ends, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The form of one adapter, sizes global.

    name: global module name of the base, such as `decoder.layers.3.mlp.linear_fc1`.
    rank: rank r of one projection; lora_A stacks those of all projections.
    rows: of the output.
    shared_a, shared_b: the factor is one over all experts (`shared_outer`).
    """

    name: str
    rank: int
    scale: float
    rows: Rows
    shared_a: bool = False
    shared_b: bool = False

    @property
    def num_projections(self) -> int:
        """Number of Hugging Face projections that the base fuses, each with an A of its own."""
        return self.rows.num_projections

    @property
    def adapter_name(self) -> str:
        """Global name of the adapter, a sibling of its base."""
        return self.name + ADAPTER_SUFFIX


def matching_target(name: str, targets: Iterable[str]) -> str | None:
    """Return the first target that selects a global module name, None where none does.

    A target is a preset, a module name (`linear_fc1`, `shared_experts.linear_fc1`), or a pattern
    with `*` over the whole name.
    """
    for target in targets:
        named = PRESETS.get(target, (target,))
        if any(name == each or name.endswith("." + each) for each in named):
            return target
        if fnmatchcase(name, target):
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
    parts: Mapping[str, int] | None = None,
) -> AdapterSpec:
    """Return the form of the adapter of the base linear with this global name.

    parts: names and sizes of the blocks of output rows, where these have names. Those of a gated
        delta net's gates come last, and have no adapter unless the configuration asks for it; so do
        those of Mamba-2 that the preset `tinker` leaves out.
    """
    leaf = name.rpartition(".")[2]
    rank = config.resolve_expert_rank(facts.moe_router_topk) if is_expert else config.rank
    gated = is_gated(name, facts)
    blocks = (out_features // 2,) * 2 if gated else (out_features,)
    if parts and not config.delta_gates:
        parts = {part: size for part, size in parts.items() if part not in DELTA_GATES}
    if parts and has_wide_parts_alone(name, config):
        parts = {part: parts[part] for part in MAMBA_WIDE}
    rows = Rows(
        blocks=tuple(parts.values()) if parts else blocks,
        names=tuple(parts or ()),
        period=() if config.shared_a else _period(name, blocks, parts or {}, config, facts),
        padded=leaf == "output_layer",
    )
    shared = is_expert and config.expert_mode == "shared_outer"
    return AdapterSpec(
        name=name,
        rank=rank,
        scale=config.scale(rank),
        rows=rows,
        shared_a=shared and leaf == "linear_fc1",
        shared_b=shared and leaf == "linear_fc2",
    )


def is_adapter_key(key: str) -> bool:
    """Tell a factor of an adapter, or its optimizer states, from other tensors."""
    return key.rpartition(".")[0].endswith(ADAPTER_SUFFIX)


def is_gated(name: str, facts: ModelFacts) -> bool:
    """Say whether the output of the base linear with this name is [gate; up]."""
    return facts.gated_linear_unit and name.rpartition(".")[2] == "linear_fc1"


def qkv_period(
    num_attention_heads: int, num_query_groups: int, kv_channels: int, *, output_gate: bool = False
) -> tuple[int, int, int]:
    """Return the rows of q, k and v of one query group of linear_qkv, which repeats them."""
    heads = num_attention_heads // num_query_groups
    # An output gate's rows belong to the query projection.
    return heads * kv_channels * (2 if output_gate else 1), kv_channels, kv_channels


def global_name(name: str, layer_numbers: dict[str, int]) -> str:
    """Turn a stage's module name into the model's: layer indices become global, from 0.

    layer_numbers: stage prefix such as `decoder.layers.1` -> Megatron's layer_number (from 1).
    """
    found = re.match(r"(.*?layers)\.(\d+)(?=\.|$)", name)
    if found is None or found.group(0) not in layer_numbers:
        return name
    return f"{found.group(1)}.{layer_numbers[found.group(0)] - 1}{name[found.end() :]}"


def has_wide_parts_alone(name: str, config: LoRAConfig) -> bool:
    """Say whether a linear is Mamba-2's in_proj of which z and x alone have adapters, an A each."""
    return name.endswith(MAMBA[0]) and matching_target(name, config.targets) == TINKER


def _period(
    name: str,
    blocks: tuple[int, ...],
    parts: Mapping[str, int],
    config: LoRAConfig,
    facts: ModelFacts,
) -> tuple[int, ...]:
    leaf = name.rpartition(".")[2]
    if name.endswith(DELTA_NET[0]) or has_wide_parts_alone(name, config):
        return tuple(parts.values())
    if len(blocks) > 1:
        return blocks
    if leaf == "linear_qkv":
        return qkv_period(
            facts.num_attention_heads,
            facts.num_query_groups,
            facts.kv_channels,
            output_gate=facts.attention_output_gate,
        )
    if leaf == "linear_kv":
        return (facts.kv_channels, facts.kv_channels)
    if leaf == "linear_qkv_down_proj":
        return (facts.q_lora_rank, sum(blocks) - facts.q_lora_rank)
    return ()
