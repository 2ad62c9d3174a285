"""What adapters cost: exact parameter counts, FLOPs of a step, bytes on each GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megalora.config import LoRAConfig
from megalora.model.facts import facts_of
from megalora.model.shape import ModelShape
from megalora.recommend.layout import Layout
from megalora.recommend.linears import Group, Linear, layer_extras, linears
from megalora.recommend.stages import even_stages
from megalora.targets import (
    AdapterSpec,
    check_all_matched,
    check_targets,
    matching_target,
    plan,
)

# Megatron's mixed precision: bf16 weights, fp32 main gradients, and fp32 master weights with both
# of Adam's moments.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Elements of one linear's lora_A and lora_B, each over all experts that it has."""

    linear: Linear
    spec: AdapterSpec
    a_elements: int
    b_elements: int

    @property
    def elements(self) -> int:
        """Count both factors, over all experts."""
        return self.a_elements * self.a_copies + self.b_elements * self.b_copies

    @property
    def used_elements(self) -> int:
        """Count the elements that one token meets: those of `uses` experts."""
        return self.linear.uses * (self.a_elements + self.b_elements)

    @property
    def a_copies(self) -> int:
        """Number of A factors: one, or one for each expert."""
        return 1 if self.spec.shared_a else max(1, self.linear.num_experts)

    @property
    def b_copies(self) -> int:
        """Number of B factors: one, or one for each expert."""
        return 1 if self.spec.shared_b else max(1, self.linear.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU of the fullest pipeline stage; activations come on top."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of all three, in bytes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs for each token in all linears, forward and backward, without recomputation.

    The attention core (QKᵀ and PV) is left out: it costs the same with and without LoRA.
    """

    full: int
    lora: int

    @property
    def ratio(self) -> float:
        """LoRA step over full step."""
        return self.lora / self.full


def adapter_sizes(shape: ModelShape, config: LoRAConfig) -> list[AdapterSize]:
    """Return the size of every adapter that the configuration gives the model.

    Raises ValueError where a target matches nothing, or ranks and experts do not go together.
    """
    return [size for _, size in _planned(shape, config) if size is not None]


def adapter_parameters(shape: ModelShape, config: LoRAConfig) -> dict[Group, int]:
    """Count trainable parameters for each group of linears that has adapters."""
    counts: dict[Group, int] = {}
    for size in adapter_sizes(shape, config):
        group = size.linear.group
        counts[group] = counts.get(group, 0) + size.elements
    return counts


def step_flops(shape: ModelShape, config: LoRAConfig) -> Flops:
    """Count FLOPs per token of a full and of a LoRA step.

    A weight of N elements costs 2N forward, 2N for dX and, trained, 2N for dW; an adapter of M
    elements costs 6M. On a square weight that is (2N² + 6NR) / (3N²), "LoRA Without Regret". Below
    the first adapter there is no backward at all.
    """
    full = lora = 0
    below = True
    for linear, size in _planned(shape, config):
        elements = linear.uses * linear.in_features * linear.out_features
        below = below and size is None
        full += 6 * elements
        lora += (2 if below else 4) * elements + (6 * size.used_elements if size else 0)
    return Flops(full=full, lora=lora)


def gpu_memory(shape: ModelShape, config: LoRAConfig | None, layout: Layout) -> Memory:
    """Return the bytes of weights, gradients and optimizer on the fullest GPU."""
    return max(stage_memory(shape, config, layout), key=lambda memory: memory.total)


def stage_memory(shape: ModelShape, config: LoRAConfig | None, layout: Layout) -> list[Memory]:
    """Return the bytes of weights, gradients and optimizer on a GPU of each pipeline stage.

    config: None means full fine-tuning. Weights are bf16, gradients fp32, Adam's master weights
    and moments fp32, these split over data-parallel copies by the distributed optimizer. Buffers
    of gradients have no padding here; what `megalora plan` reads off them has. Raises ValueError
    where the layout does not divide the model.
    """
    _check_divides(shape, layout)
    shape = replace(shape, vocab_size=layout.padded(shape.vocab_size))
    stages = [_Stage(layout) for _ in range(layout.pp)]
    places = layout.stages or even_stages(shape.num_layers, layout.pp)
    for linear, size in _planned(shape, config) if config else _unplanned(shape):
        stage = stages[places[linear.layer]]
        if linear.group != "unembedding":  # may be tied: _add_embeddings counts it
            stage.add_base(linear, trained=config is None)
        if size is not None:
            stage.add_adapter(size)
    _add_embeddings(shape, stages, places, trained=config is None)
    return [stage.memory() for stage in stages]


class _Stage:
    """Elements of one GPU: frozen, trained with dense copies, trained with expert copies."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.frozen = self.dense = self.expert = 0.0

    def add_base(self, linear: Linear, *, trained: bool) -> None:
        layout = self.layout
        is_expert, tp = linear.num_experts > 0, 1 if linear.duplicated else layout.tp
        shards = layout.ep * layout.expert_tp if is_expert else tp
        self.add(linear.parameters / shards, trained=trained, is_expert=is_expert)

    def add_adapter(self, size: AdapterSize) -> None:
        layout, num_experts = self.layout, size.linear.num_experts
        for elements, copies, shared in (
            (size.a_elements, size.a_copies, size.spec.shared_a),
            (size.b_elements, size.b_copies, size.spec.shared_b),
        ):
            # A factor shared over all experts is on every ep rank, split as a dense one.
            is_expert = num_experts > 0 and not shared
            shards = layout.ep * layout.expert_tp if is_expert else layout.tp
            self.add(elements * copies / shards, trained=True, is_expert=is_expert)

    def add(self, elements: float, *, trained: bool, is_expert: bool = False) -> None:
        if not trained:
            self.frozen += elements
        elif is_expert:
            self.expert += elements
        else:
            self.dense += elements

    def memory(self) -> Memory:
        layout = self.layout
        trained = self.dense + self.expert
        sharded = self.dense / layout.dp + self.expert / layout.expert_dp
        return Memory(
            weights=WEIGHT_BYTES * (self.frozen + trained),
            gradients=GRADIENT_BYTES * trained,
            optimizer=OPTIMIZER_BYTES * (sharded if layout.distributed_optimizer else trained),
        )


def _planned(shape: ModelShape, config: LoRAConfig) -> Iterator[tuple[Linear, AdapterSize | None]]:
    """Yield every linear with its adapter's size, None where it has none."""
    check_targets(config.targets)
    matched = {matching_target(linear.name, config.targets) for linear in linears(shape)}
    leaves = {linear.name.rpartition(".")[2] for linear in linears(shape)}
    check_all_matched(config.targets, {target for target in matched if target}, leaves)
    facts = facts_of(shape)
    for linear in linears(shape):
        if matching_target(linear.name, config.targets) is None:
            yield linear, None
            continue
        is_expert = linear.num_experts > 0
        spec = plan(
            linear.name,
            linear.out_features,
            config,
            facts,
            is_expert=is_expert,
            parts=linear.parts,
        )
        a_elements = spec.num_projections * spec.rank * linear.in_features
        yield linear, AdapterSize(linear, spec, a_elements, spec.rank * spec.rows.size)


def _unplanned(shape: ModelShape) -> Iterator[tuple[Linear, None]]:
    return ((linear, None) for linear in linears(shape))


def _add_embeddings(
    shape: ModelShape, stages: list[_Stage], places: tuple[int, ...], *, trained: bool
) -> None:
    table = shape.vocab_size * shape.hidden_size / stages[0].layout.tp
    stages[0].add(table, trained=trained)
    # Tied weights exist once on one stage, and as a copy on the last of several.
    if not shape.tied_embeddings or len(stages) > 1:
        stages[-1].add(table, trained=trained)
    # The last stage embeds the tokens that lead to those predicted beyond the next.
    if shape.mtp_num_layers and not shape.tied_embeddings and len(stages) > 1:
        stages[-1].add(table, trained=trained)
    for layer, extras in enumerate(layer_extras(shape)):
        stages[places[layer]].add(extras, trained=trained)
    stages[-1].add(shape.hidden_size, trained=trained)


def _check_divides(shape: ModelShape, layout: Layout) -> None:
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if heads % layout.tp or (groups % layout.tp and layout.tp % groups):
        raise ValueError(
            f"tp {layout.tp} does not divide {heads} attention heads in {groups} query groups: "
            "use a divisor of both"
        )
    for what, count in (
        ("key heads of gated delta nets", shape.linear_num_key_heads),
        ("groups of Mamba-2's heads", shape.mamba_num_groups),
    ):
        if count % layout.tp:
            raise ValueError(
                f"tp {layout.tp} does not divide {count} {what}: use a divisor of both"
            )
    if layout.pp > shape.num_layers:
        raise ValueError(f"pp {layout.pp} exceeds {shape.num_layers} layers: lower --pp")
    if layout.ep > 1 and (not shape.num_moe_experts or shape.num_moe_experts % layout.ep):
        raise ValueError(
            f"ep {layout.ep} does not divide {shape.num_moe_experts} experts: use a divisor of them"
        )
