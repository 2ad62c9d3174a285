"""How a run lies over its GPUs."""

import argparse
from dataclasses import dataclass
from typing import Self

from megalora.recommend.stages import even_stages, stages_of_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of Megatron's parallel groups; `dp` copies of the dense weights, context included.

    etp: expert-tensor-parallel size, Megatron's default is tp. stages: the pipeline stage of each
    layer, empty where all have as many. vocab_multiple: the vocabulary is padded to a multiple of
    this times tp; the default is Megatron's.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    etp: int | None = None
    distributed_optimizer: bool = True
    stages: tuple[int, ...] = ()
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "pp", "dp", "expert_tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.tp * self.dp % (self.ep * self.expert_tp):
            raise ValueError(
                f"ep {self.ep} x etp {self.expert_tp} does not divide tp {self.tp} x dp {self.dp}: "
                "experts are spread over the same GPUs, so raise --dp or lower --ep"
            )

    @classmethod
    def from_megatron_args(cls, args: argparse.Namespace) -> Self:
        """Read Megatron's parsed arguments."""
        tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        stages = stages_of_layers(args)
        return cls(
            tp=tp,
            ep=args.expert_model_parallel_size,
            pp=pp,
            dp=args.world_size // (tp * pp),
            etp=args.expert_tensor_parallel_size,
            distributed_optimizer=args.use_distributed_optimizer,
            stages=() if stages == even_stages(args.num_layers, pp) else stages,
            vocab_multiple=getattr(args, "make_vocab_size_divisible_by", None) or 128,
        )

    @property
    def expert_tp(self) -> int:
        """Expert-tensor-parallel size."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        """Number of copies of each expert."""
        return self.tp * self.dp // (self.ep * self.expert_tp)

    def padded(self, vocab_size: int) -> int:
        """Return the rows of a vocabulary with Megatron's padding."""
        multiple = self.vocab_multiple * self.tp
        return -(-vocab_size // multiple) * multiple

    @property
    def num_gpus(self) -> int:
        """Number of GPUs of the whole job."""
        return self.tp * self.pp * self.dp
