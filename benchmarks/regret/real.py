"""The article's experiments on a pretrained model: which runs each needs, and in which order.

A method is a run whose rate and seed are open; it has a grid of rates, which results so far may ask
to be wider. The first seed comes before the second, so that what a short budget leaves is whole.
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
# The rate of a method.
OPEN = 0.0


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

    def method(self, rank: int) -> Job:
        """Return the sweep's run of a rank, its rate and seed open."""
        return Job(
            rank=rank,
            lr=OPEN,
            seed=0,
            base="pretrained",
            model=self.model,
            precision=self.precision,
            steps=self.steps,
            batch_size=self.batch_size,
            seq_length=self.seq_length,
        )

    def job(self, rank: int, lr: float, seed: int) -> Job:
        """Return a run of the sweep."""
        return replace(self.method(rank), lr=lr, seed=seed)


def rates(method: Job, results: Results, scale: RealScale) -> tuple[float, ...]:
    """Return the rates of a method, as far as results ask for.

    The best is none of the ends, neither of the mean of seeds nor of one of them. Seeds count that
    have results at all rates of the grid.
    """
    grid = LORA_RATES if method.rank else FULL_RATES
    while whole := _whole(method, grid, results, scale):
        best = {_best_of(grid, [seed]) for seed in whole} | {_best_of(grid, whole)}
        low, high = LADDER.index(grid[0]), LADDER.index(grid[-1])
        if grid[0] in best and low > 0:
            grid = (LADDER[low - 1], *grid)
        elif grid[-1] in best and high + 1 < len(LADDER):
            grid = (*grid, LADDER[high + 1])
        else:
            break
    return grid


def _whole(
    method: Job, grid: Sequence[float], results: Results, scale: RealScale
) -> list[dict[float, Result]]:
    """Return the results by rate of the seeds that have all of them."""
    jobs = [{lr: replace(method, lr=lr, seed=seed) for lr in grid} for seed in scale.seeds]
    return [
        {lr: results[job] for lr, job in of.items()}
        for of in jobs
        if all(job in results for job in of.values())
    ]


def _best_of(grid: Sequence[float], seeds: Sequence[dict[float, Result]]) -> float:
    return min(grid, key=lambda lr: mean_loss([seed[lr] for seed in seeds]))


def best_rate(method: Job, results: Results, scale: RealScale) -> float:
    """Return the best rate of a method whose runs are done."""
    grid = rates(method, results, scale)
    return _best_of(grid, _whole(method, grid, results, scale))


def runs(methods: Sequence[Job], results: Results, scale: RealScale) -> list[Job]:
    """Return the runs of methods that results so far ask for: of one seed after another."""
    return [
        replace(method, lr=lr, seed=seed)
        for seed in scale.seeds
        for method in methods
        for lr in rates(method, results, scale)
    ]


def sweep_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return the runs of full fine-tuning and of all ranks."""
    return runs([scale.method(rank) for rank in (0, *RANKS)], results, scale)


def placement_method(targets: tuple[str, ...], scale: RealScale) -> Job:
    """Return the runs with adapters in some layers, as many parameters as in the others."""
    return replace(scale.method(PLACEMENTS[targets]), targets=targets)


def placement_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return the runs with the same number of parameters in different layers."""
    return runs([placement_method(targets, scale) for targets in PLACEMENTS], results, scale)


def batch_method(rank: int, batch_size: int, scale: RealScale) -> Job:
    """Return the runs on the sweep's rows in batches of another size."""
    steps = scale.steps * scale.batch_size // batch_size
    return replace(scale.method(rank), batch_size=batch_size, steps=steps)


def batch_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return the runs on the same rows in batches of several sizes."""
    methods = [batch_method(rank, size, scale) for rank in (0, MIDDLE) for size in BATCH_SIZES]
    return runs(methods, results, scale)


def precision_pairs(scale: RealScale) -> list[tuple[Job, Job]]:
    """Return two runs of the sweep, each in fp32 and in the precision of all others."""
    own = (scale.job(0, FULL_RATES[1], 0), scale.job(MIDDLE, LORA_RATES[1], 0))
    return [(replace(job, precision="fp32"), job) for job in own]


def precision_jobs(scale: RealScale) -> list[Job]:
    """Return the runs of these pairs."""
    return [job for pair in precision_pairs(scale) for job in pair]


def mean_loss(seeds: Sequence[Result]) -> float:
    """Return the mean held-out loss, infinite where a run has lost its numbers."""
    found = mean(result.final for result in seeds)
    return math.inf if math.isnan(found) else found
