"""One training run of an experiment, and what it gives."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

Base = Literal["dense", "moe", "ambiguous", "halves"]

# Answers to each prompt of reinforcement learning.
GROUP_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tuning run. rank 0 means full fine-tuning."""

    lr: float
    seed: int
    rank: int = 0
    targets: tuple[str, ...] = ("all",)
    base: Base = "dense"
    steps: int = 400
    batch_size: int = 32
    is_rl: bool = False
    pretrain_steps: int = 1500

    @property
    def key(self) -> str:
        """Name the run's file by everything that decides its result."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gives: a value for each step, and one at the end.

    curve: training loss in nats, or the share of right answers. final: held-out loss, or that
    share over the last tenth of the run. trainable: trained parameters.
    """

    curve: list[float]
    final: float
    trainable: int
