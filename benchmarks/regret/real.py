"""The article's experiments on a pretrained model: which runs each needs, and in which order.

Runs of a later stage depend on the rates that an earlier one found best. The first seed of all
comes before the second, so that what a short budget leaves is whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from benchmarks.regret.experiments import Results
from benchmarks.regret.job import Job, Precision, Result

RANKS = (1, 16, 256)
# Half decades; a grid whose best rate is at its edge is extended along it.
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FULL_RATES, LORA_RATES = (3e-5, 1e-4, 3e-4), (3e-4, 1e-3, 3e-3)
# Of SmolLM2-135M: 3.8 million parameters for attention and for the MLP, 3.7 million for both.
PLACEMENTS: dict[tuple[str, ...], int] = {("attn",): 33, ("mlp",): 20, ("attn", "mlp"): 12}
BATCH_SIZES = (4, 8, 32)
MIDDLE = 16


@dataclass(frozen=True, kw_only=True)
class RealScale:
    """How long the runs on a pretrained model are.

    model: the name of its directory. A step has batch_size rows of seq_length tokens.
    """

    model: str
    steps: int = 32
    batch_size: int = 8
    seq_length: int = 96
    seeds: tuple[int, ...] = (0, 1)
    precision: Precision = "bf16"

    def job(self, rank: int, lr: float, seed: int) -> Job:
        """Return a run of the sweep."""
        return Job(
            rank=rank,
            lr=lr,
            seed=seed,
            base="pretrained",
            model=self.model,
            precision=self.precision,
            steps=self.steps,
            batch_size=self.batch_size,
            seq_length=self.seq_length,
        )


def rates(rank: int, results: Results, scale: RealScale) -> tuple[float, ...]:
    """Return the rates of a method, as far as results ask for: the best is none of the ends.

    Seeds count that have results at all rates of the grid.
    """
    grid = LORA_RATES if rank else FULL_RATES
    while best := best_of(rank, grid, results, scale):
        at, last = LADDER.index(best), len(LADDER) - 1
        if best == grid[0] and at > 0:
            grid = (LADDER[at - 1], *grid)
        elif best == grid[-1] and at < last:
            grid = (*grid, LADDER[at + 1])
        else:
            break
    return grid


def best_of(rank: int, grid: Sequence[float], results: Results, scale: RealScale) -> float | None:
    """Return the rate with the least mean loss; None where no seed has results at all of them."""
    jobs = {lr: [scale.job(rank, lr, seed) for seed in scale.seeds] for lr in grid}
    whole = [n for n in range(len(scale.seeds)) if all(j[n] in results for j in jobs.values())]
    if not whole:
        return None
    return min(grid, key=lambda lr: mean_loss([results[jobs[lr][n]] for n in whole]))


def sweep_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return the runs of the sweep that results so far ask for: of one seed after another."""
    return [
        scale.job(rank, lr, seed)
        for seed in scale.seeds
        for rank in (0, *RANKS)
        for lr in rates(rank, results, scale)
    ]


def precision_jobs(scale: RealScale) -> list[Job]:
    """Return the two runs of the sweep that are done again in fp32."""
    runs = (scale.job(0, FULL_RATES[1], 0), scale.job(MIDDLE, LORA_RATES[1], 0))
    return [replace(job, precision="fp32") for job in runs]


def best_rate(rank: int, results: Results, scale: RealScale) -> float:
    """Return the best rate of the sweep, which is done."""
    best = best_of(rank, rates(rank, results, scale), results, scale)
    assert best is not None
    return best


def placement_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return runs with the same number of parameters in different layers, at two rates."""
    best = best_rate(MIDDLE, results, scale)
    near = [lr for lr in rates(MIDDLE, results, scale) if lr != best]
    second = min(near, key=lambda lr: _loss(MIDDLE, lr, results, scale))
    return [
        replace(scale.job(rank, lr, seed), targets=targets)
        for seed in scale.seeds
        for targets, rank in PLACEMENTS.items()
        for lr in (best, second)
    ]


def batch_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return runs on the same rows in batches of several sizes, at the best rate and around it."""
    jobs = []
    for seed in scale.seeds:
        for rank in (0, MIDDLE):
            at = LADDER.index(best_rate(rank, results, scale))
            jobs += [
                replace(
                    scale.job(rank, lr, seed),
                    batch_size=size,
                    steps=scale.steps * scale.batch_size // size,
                )
                for size in BATCH_SIZES
                for lr in LADDER[at - 1 : at + 2]
            ]
    return jobs


def pairs(scale: RealScale) -> list[Job]:
    """Return the runs in fp32 with their likes in the sweep."""
    plain = precision_jobs(scale)
    return [*plain, *(replace(job, precision=scale.precision) for job in plain)]


def mean_loss(seeds: Sequence[Result]) -> float:
    """Return the mean held-out loss, infinite where a run has lost its numbers."""
    found = mean(result.final for result in seeds)
    return math.inf if math.isnan(found) else found


def _loss(rank: int, lr: float, results: Results, scale: RealScale) -> float:
    return mean_loss([results[scale.job(rank, lr, seed)] for seed in scale.seeds])
