"""What the parsed flags of a run say of all its ranks."""

import argparse
from dataclasses import dataclass
from typing import Any

from megalora.arguments import lora_config_from_args
from megalora.recommend import recommend_for_args
from megalora.recommend.notes import capacity_notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run's ranks are laid out: sizes of Megatron's parallel groups.

    virtual: model chunks of each pipeline stage. data: replicas that read different samples.
    stages_before_data: the stages of a replica follow each other, by --use-tp-pp-dp-mapping.
    """

    world_size: int
    tensor: int
    sequence_parallel: bool
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    data: int
    stages_before_data: bool

    def first_of(self, stage: int) -> int:
        """Return the first rank of a pipeline stage."""
        if self.stages_before_data:
            return stage * self.tensor * self.context
        return stage * self.world_size // self.pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one optimizer step reads: sequences, and how they are cut.

    microbatches: of each replica.
    """

    micro: int
    whole: int
    microbatches: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step of the whole run."""
        return self.whole * self.sequence_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """The adapters of the whole model, as `megalora recommend` describes it.

    learning_rate: the lowest and the highest that the rule gives, one number twice where it knows
    the model's family.
    """

    config: dict[str, Any]
    parameters: int
    learning_rate: tuple[float, float]
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a run could choose otherwise to hold less, beside its layout.

    recompute: Megatron's granularity, empty without. experts: of the model. latent: its attention
    has latents.
    """

    distributed_optimizer: bool
    recompute: str
    experts: int
    latent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the parsed flags of a run say of all its ranks.

    learning_rate: the given one. adapters: None without LoRA, and where sizes are not described.
    notes: what the user should know.
    """

    layout: Layout
    batch: Batch
    choices: Choices
    learning_rate: float | None
    adapters: Adapters | None
    notes: tuple[str, ...]


def facts_of(args: argparse.Namespace, notes: tuple[str, ...] = ()) -> Facts:
    """Read Megatron's parsed and validated flags, with those of LoRA."""
    replicas = args.data_parallel_size
    batch = Batch(
        micro=args.micro_batch_size,
        whole=args.global_batch_size,
        microbatches=args.global_batch_size // (args.micro_batch_size * replicas),
        sequence_length=args.seq_length,
    )
    layout = Layout(
        world_size=args.world_size,
        tensor=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size or 1,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        data=replicas,
        stages_before_data=args.use_tp_pp_dp_mapping,
    )
    choices = Choices(
        distributed_optimizer=args.use_distributed_optimizer,
        recompute=args.recompute_granularity or "",
        experts=args.num_experts or 0,
        latent=args.multi_latent_attention,
    )
    adapters, more = _adapters(args)
    return Facts(
        layout=layout,
        batch=batch,
        choices=choices,
        learning_rate=args.lr,
        adapters=adapters,
        notes=(*notes, *more),
    )


def _adapters(args: argparse.Namespace) -> tuple[Adapters | None, tuple[str, ...]]:
    config = lora_config_from_args(args)
    if config is None:
        return None, ("without --lora-rank the whole model is trained",)
    try:
        found = recommend_for_args(args, config, family=args.lora_family or "")
    except ValueError as error:
        return None, (f"no recommendation: {error}",)
    # How much data there is, a plan is not told.
    left_out = capacity_notes(None, config)
    adapters = Adapters(
        config=config.to_dict(),
        parameters=found.trainable,
        learning_rate=found.rates.lora,
        family=found.rates.family,
    )
    return adapters, tuple(note for note in found.notes if note not in left_out)
