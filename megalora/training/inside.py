"""`--lora-log-interval`: what happens inside the adapters, printed and through Megatron's writers.

Every N iterations, by kind of module, the means over all its matrices (a layer's, a projection's of
a fused linear, an expert's): norms of A and B, the update over the frozen weight, and the basis by
which training depends on alpha, the rates and the start ("LoRA Without Regret", Schulman and
Thinking Machines Lab, 2025, on parametrization). A run without the flag does nothing here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0, training
from torch import Tensor

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.norms import Measured, measure, weight_norms
from megalora.adapters.world import largest, summed, union
from megalora.config import LoRAConfig
from megalora.policy.policy import gather_parameters
from megalora.policy.report import write
from megalora.recommend.rules import two_number_basis
from megalora.replace import Patch, around

# What is logged of each kind, as `lora/<name>/<kind>`: means over its matrices, then the largest.
NORMS = ("norm-A", "norm-B", "spectral-A", "spectral-B", "B-above-A")
UPDATES = ("update", "update-spectral")
BASIS = ("start", "steps")
COLUMNS = (*NORMS, *UPDATES, *BASIS)
LARGEST = "update-largest"
# Modules that have linears of the same names as others'.
_PARENTS = ("experts", "shared_experts", "mixer")


def kind_of(name: str) -> str:
    """Return the kind of module that a global name is of, as `linear_qkv`, `experts.linear_fc1`."""
    *_, parent, leaf = ["", *name.split(".")]
    return f"{parent}.{leaf}" if parent in _PARENTS else leaf


@dataclass(frozen=True, slots=True)
class Run:
    """What is looked at: model chunks as they are wrapped, and what trains them."""

    model_chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    config: OptimizerConfig
    lora: LoRAConfig

    def adapters(self) -> list[LoRAAdapter]:
        """Return this rank's adapters."""
        return [adapter for _, adapter in named_adapters(self.model_chunks)]

    def rates(self) -> Callable[[LoRAAdapter], tuple[float, float]]:
        """Return what gives the present learning rates of an adapter's A and B."""
        now = {group["max_lr"]: group["lr"] for group in self.optimizer.param_groups}
        unembedding = self.config.decoupled_lr

        def rates_of(adapter: LoRAAdapter) -> tuple[float, float]:
            own = adapter.spec.name == "output_layer" and unembedding is not None
            peak = unembedding if own else self.config.lr
            assert peak is not None
            return now.get(peak, math.nan), now.get(peak * self.lora.lr_ratio, math.nan)

        return rates_of


class Inside:
    """Look at a run's adapters every so many iterations; all ranks look at once."""

    def __init__(self) -> None:
        self.interval: int | None = None
        self._run: Run | None = None
        self._kinds: list[str] = []
        self._weights: list[Tensor] = []

    def watch(self, run: Run) -> None:
        """Look at this run from now on, if --lora-log-interval asks for it."""
        self._run, self._kinds, self._weights = run if self.interval else None, [], []

    def log(self, iteration: int) -> None:
        """Log an iteration, after its step, where its turn is; all ranks must call it."""
        if self._run is None or not self.interval or iteration % self.interval:
            return
        found = self.look(self._run)
        write(iteration, {f"lora/{name}": value for name, value in found.items()})
        print_rank_0(f"lora after iteration {iteration} | {_in_short(found)}")

    def look(self, run: Run) -> dict[str, float]:
        """Return what is logged, by `<name>/<kind>` and for all kinds together by `<name>/all`.

        The same on all ranks, which must all call it: an all-reduce of thin Gram matrices for each
        tensor-parallel group, and two of some numbers for each kind.
        """
        gather_parameters(run.model_chunks, run.optimizer)
        adapters = run.adapters()
        if not self._kinds:
            own = {kind_of(adapter.spec.name) for adapter in adapters}
            self._kinds = sorted(union(own, torch.distributed.group.WORLD))
            self._weights = weight_norms(unwrap_model(list(run.model_chunks)), adapters)
        # For each kind and column: what it adds up to, and of how many.
        sums = torch.zeros(len(self._kinds), len(COLUMNS), 2, dtype=torch.float64)
        most = dict.fromkeys(self._kinds, -math.inf)
        rates = run.rates()
        for one, weights in zip(measure(adapters), self._weights, strict=True):
            kind = kind_of(one.adapter.spec.name)
            values = {**_norms(one, weights), **_basis(run, one, rates(one.adapter))}
            for name, each in values.items():
                counted = torch.stack([each.sum(), torch.tensor(float(len(each)))])
                sums[self._kinds.index(kind), COLUMNS.index(name)] += counted / one.holders
            most[kind] = max([most[kind], *values["update"].nan_to_num(math.inf).tolist()])
        return _named(self._kinds, summed(sums), largest(list(most.values())))


def _norms(one: Measured, weights: Tensor) -> dict[str, Tensor]:
    """Return the norms of an adapter's matrices [n], those of updates where |W| is known."""
    norms, scale, known = one.norms, abs(one.adapter.spec.scale), weights > 0
    return {
        "norm-A": norms.a,
        "norm-B": norms.b,
        "spectral-A": norms.spectral_a,
        "spectral-B": norms.spectral_b,
        "B-above-A": (norms.spectral_b > norms.spectral_a).double(),
        "update": (scale * norms.product / weights)[known],
        "update-spectral": (scale * norms.spectral_product / weights)[known],
    }


def _basis(run: Run, one: Measured, rates: tuple[float, float]) -> dict[str, Tensor]:
    """Return the two numbers for each matrix, none for another optimizer, start or kind."""
    if run.config.optimizer != "adam" or (run.lora.init, run.lora.kind) != ("uniform", "lora"):
        return {}
    own = replace(run.lora, rank=one.adapter.spec.rank)
    both = two_number_basis(own, one.adapter.base.in_features, *rates)
    count = len(one.norms.a)
    return {
        name: torch.full((count,), x, dtype=torch.float64)
        for name, x in zip(BASIS, both, strict=True)
    }


def _named(kinds: Sequence[str], sums: Tensor, most: Sequence[float]) -> dict[str, float]:
    """Return the means and the largest by name and kind, without those of nothing."""
    found = {}
    rows = zip(
        [*kinds, "all"], [*sums, sums.sum(0)], [*most, max(most, default=-math.inf)], strict=True
    )
    for kind, of_kind, largest_one in rows:
        for name, (total, count) in zip(COLUMNS, of_kind.tolist(), strict=True):
            if count:
                found[f"{name}/{kind}"] = total / count
        if largest_one > -math.inf:
            found[f"{LARGEST}/{kind}"] = largest_one
    return found


def _in_short(found: Mapping[str, float]) -> str:
    """Return one line about all kinds together."""
    said = {name: f"{found[f'{name}/all']:.3g}" for name in COLUMNS if f"{name}/all" in found}
    parts = []
    if "update" in said:
        most = {n.partition("/")[2]: v for n, v in found.items() if n.startswith(f"{LARGEST}/")}
        del most["all"]
        where = max(most, key=most.__getitem__)
        parts.append(f"|c B A| / |W|: {said['update']}, at most {most[where]:.3g} in {where}")
    if "spectral-A" in said:
        above = f"{found['B-above-A/all']:.0%}"
        of_both = f"A {said['spectral-A']}, B {said['spectral-B']}"
        parts.append(f"spectral norms: {of_both}, B above A in {above}")
    if "start" in said:
        parts.append(f"alpha init_A LR_B: {said['start']}")
        parts.append(f"init_A / LR_A: {said['steps']} steps")
    return " | ".join(parts)


INSIDE = Inside()


def log_inside(iteration: int) -> None:
    """Log what happens inside the adapters of this process's run, where its flags ask for it.

    For loops of one's own, once after each iteration, on all ranks. In Megatron's it is called
    already.
    """
    INSIDE.log(iteration)


def _training_log(
    original: Callable[..., object],
    loss_dict: object,
    total_loss_dict: object,
    learning_rate: object,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> object:
    result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
    INSIDE.log(iteration)
    return result


PATCHES = (
    Patch(
        training,
        "training_log",
        ("loss_dict", "total_loss_dict", "learning_rate", "iteration"),
        around(_training_log),
        "`--lora-log-interval`: what happens inside the adapters is not logged",
    ),
)
