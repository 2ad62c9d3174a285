"""One training run of an experiment, and what it gives."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, Self

Base = Literal["dense", "moe", "ambiguous", "halves", "pretrained"]
Precision = Literal["bf16", "fp32"]

# Answers to each prompt of reinforcement learning.
GROUP_SIZE = 8
# Rows that the held-out loss of a pretrained model is the mean of.
HELD_OUT_ROWS = 48
# Questions that a rewarded model is measured on.
HELD_OUT_QUESTIONS = 64


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tuning run. rank 0 means full fine-tuning.

    The last four are of a pretrained base alone: the name of its directory, the precision that
    it computes in, the tokens of a row of its data, and the kind of questions that it answers where
    that is another than the rewarded one.
    """

    lr: float
    seed: int
    rank: int = 0
    targets: tuple[str, ...] = ("all",)
    base: Base = "dense"
    steps: int = 400
    batch_size: int = 32
    is_rl: bool = False
    pretrain_steps: int = 1500
    model: str | None = None
    precision: Precision | None = None
    seq_length: int | None = None
    questions: str | None = None

    @property
    def key(self) -> str:
        """Name the run's file by everything that decides its result."""
        decides = {name: value for name, value in asdict(self).items() if value is not None}
        text = json.dumps(decides, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Spectral norms of the adapters at the end of a run, means over modules.

    update: of alpha / r B A. relative: the same over that of the base weight. b_above_a: share of
    modules where the norm of B is above that of A.
    """

    a: float
    b: float
    update: float
    relative: float
    b_above_a: float
    modules: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gives: a value for each step, and one at the end.

    curve: training loss in nats, or the share of right answers. final: held-out loss, or that
    share over the last tenth of the run. trainable: trained parameters. cpu_seconds: of the
    processor, for the steps. norms: where the run had adapters on a pretrained base.
    Of a pretrained model that was rewarded: before: final, before the first step; gap: the largest
    difference of a sampled token's log probability from the learner's, in nats. Of one that only
    answered: curve: for each question; examples: questions with what is right and what was said.
    """

    curve: list[float]
    final: float
    trainable: int
    cpu_seconds: float | None = None
    norms: Norms | None = None
    before: float | None = None
    gap: float | None = None
    examples: list[list[str]] | None = None

    def to_json(self) -> str:
        """Return it as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` wrote."""
        fields = json.loads(text)
        norms = fields.pop("norms", None)
        return cls(**fields, norms=Norms(**norms) if norms else None)
