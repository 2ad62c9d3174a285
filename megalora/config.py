"""The one description of an adapter: what it adapts, how large it is, how it starts."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from inspect import cleandoc
from typing import Any, Literal, Self, get_args

ExpertMode = Literal["per_expert", "shared_outer"]
Init = Literal["uniform", "pissa"]
OpsBackend = Literal["fused", "reference"]

# No linear has so many singular values; and alpha / r is then an ordinary float32.
MAX_RANK = 1 << 16
MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30
RANKS = f"an integer >= 1 and <= {MAX_RANK}"
ALPHAS = f"a number > 0, from {MIN_ALPHA:g} to {MAX_ALPHA:g}"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Describe LoRA adapters; the defaults are those of "LoRA Without Regret".

    rank: rank r of every dense adapter.
    alpha: an adapter of rank r is scaled by alpha / r (alpha / sqrt(r) with `rslora`).
    dropout: probability of dropping an element of an adapter's input in training, in [0, 1).
    targets: what gets adapters: presets, names of Megatron's modules such as linear_qkv, router or
        eh_proj, patterns of whole names such as decoder.layers.0.*. Presets are `all`; `attn`
        (attention, and gated delta nets in its place); `mlp`; `mamba` (Mamba-2's in_proj and
        out_proj); `unembed`; `tinker`, which with `expert_mode` shared_outer is the layout of
        Thinking Machines' service: all but the up projections of multi-latent attention (of
        Mamba's in_proj all rows, where the service adapts z and x).
    expert_rank: rank of each expert's adapter; by default rank / moe_router_topk, which must be
        whole, and with `expert_mode` shared_outer the rank itself.
    expert_mode: `per_expert` gives every expert its own A and B; `shared_outer` shares A of
        linear_fc1 (of gate and up) and B of linear_fc2 (of down) over all experts, at full rank.
    shared_a: one A for each fused linear of Megatron instead of one for each projection of Hugging
        Face (q, k, v, gate, up).
    delta_gates: adapt also the rows of a gated delta net's in_proj that make beta and alpha, one
        of each for a head of values, both with an A of their own. Query, key, value and z have
        adapters anyway.
    seed: seed of the start values, which are the same on every parallel layout.
    rslora: scale by alpha / sqrt(r).
    init: `uniform` draws A from U(-1/sqrt(d_in), 1/sqrt(d_in)) and sets B to zero; `pissa` takes
        the leading singular triplets of the base weight, which keeps the residual.
    lr_ratio: learning rate of B over that of A.
    eps_a: Adam's epsilon for A; by default the optimizer's own, --adam-eps.
    eps_b: Adam's epsilon for B; by default the optimizer's own, --adam-eps.
    ops: `fused` C++/CUDA kernels, or `reference` in plain torch for debugging.
    kind: which factors an adapter has, an entry of `megalora.adapters.kinds.KINDS`, yours too.
    """

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    expert_rank: int | None = None
    expert_mode: ExpertMode = "per_expert"
    shared_a: bool = False
    delta_gates: bool = False
    seed: int = 1234
    rslora: bool = False
    init: Init = "uniform"
    lr_ratio: float = 1.0
    eps_a: float | None = None
    eps_b: float | None = None
    ops: OpsBackend = "fused"
    kind: str = "lora"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        self._check_numbers()
        _require(len(self.targets) > 0, "targets", self.targets, "at least one preset or name")
        for name, choices in (
            ("expert_mode", get_args(ExpertMode)),
            ("init", get_args(Init)),
            ("ops", get_args(OpsBackend)),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), _one_of(choices))
        _require(
            not (self.init == "pissa" and self.expert_mode == "shared_outer"),
            "init",
            self.init,
            "`uniform` where expert_mode is `shared_outer`: a shared factor has no single base",
        )
        _require(
            not (self.init == "pissa" and self.shared_a),
            "init",
            self.init,
            "`uniform` where shared_a is set: each projection has its own singular vectors",
        )

    def _check_numbers(self) -> None:
        _require(is_rank(self.rank), "rank", self.rank, RANKS)
        _require(is_alpha(self.alpha), "alpha", self.alpha, ALPHAS)
        is_probability = is_number(self.dropout) and 0 <= self.dropout < 1
        _require(is_probability, "dropout", self.dropout, "a probability in [0, 1)")
        _require(
            self.expert_rank is None or is_rank(self.expert_rank),
            "expert_rank",
            self.expert_rank,
            f"{RANKS}, or leave it out for rank / moe_router_topk",
        )
        _require(_is_int(self.seed) and self.seed >= 0, "seed", self.seed, "an integer >= 0")
        positive = is_number(self.lr_ratio) and self.lr_ratio > 0
        _require(positive, "lr_ratio", self.lr_ratio, "a finite number > 0")
        for name in ("eps_a", "eps_b"):
            eps = getattr(self, name)
            _require(
                eps is None or (is_number(eps) and eps >= 0), name, eps, "a finite number >= 0"
            )
        for name in ("shared_a", "delta_gates", "rslora"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "true or false")

    def scale(self, rank: int) -> float:
        """Return the factor c of y += c B A x for an adapter of this rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def resolve_expert_rank(self, topk: int) -> int:
        """Return the rank of one expert's adapter in a model with `topk` active experts.

        Raises ValueError where rank / topk is not whole.
        """
        if self.expert_mode == "shared_outer":
            return self.expert_rank or self.rank
        if self.expert_rank is not None:
            return self.expert_rank
        if self.rank % topk:
            works = ", ".join(str(topk * k) for k in (1, 2, 3))
            raise ValueError(
                f"lora_rank {self.rank} is not divisible by moe_router_topk {topk}: "
                f"use {works}, ... or set --lora-expert-rank"
            )
        return self.rank // topk

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from `to_dict`'s result; an unknown field raises ValueError."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"LoRAConfig has no field {unknown}: it has {sorted(known)}")
        return cls(**values)


def field_texts() -> dict[str, str]:
    """Return what LoRAConfig's docstring says of each field: the one source of the flags' help."""
    text = cleandoc(LoRAConfig.__doc__ or "")
    entries = re.findall(r"^(\w+): (.+(?:\n    .*)*)", text, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in entries}


def is_number(value: object) -> bool:
    """Say whether a value, of a file or a flag, is a finite number that a float holds.

    NaN, infinities, integers such as 10**400, true, false and texts are none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def is_rank(value: object) -> bool:
    """Say whether a value can be the rank of an adapter."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def is_alpha(value: object) -> bool:
    """Say whether a value can be the alpha of an adapter."""
    return isinstance(value, int | float) and is_number(value) and MIN_ALPHA <= value <= MAX_ALPHA


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(choices)


def _require(valid: bool, field: str, value: object, remedy: str) -> None:
    if not valid:
        raise ValueError(f"lora_{field} is {value!r}: it must be {remedy}")
