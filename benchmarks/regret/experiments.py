"""The article's experiments: which runs each needs, and what they say.

An experiment is a function of the results so far that returns the runs it needs; the second stage
of some depends on the best learning rates of a sweep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

from benchmarks.regret.job import Base, Job, Result

Results = dict[Job, Result]

RANKS = (1, 4, 16, 64)
SEEDS = (0, 1)
RL_RANKS = (0, 1, 8)
RL_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long the experiments run."""

    sweep_steps: int = 300
    long_steps: int = 1500
    placement_steps: int = 400
    rl_steps: int = 100
    rl_long_steps: int = 400
    rl_fact_steps: int = 200
    early_steps: int = 20
    pretrain_steps: int = 1500
    sweep_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot, with the values of each seed."""

    label: str
    x: list[float]
    seeds: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the article found, what these runs show, and whether they agree.

    holds: None where the toy cannot tell.
    """

    article: str
    here: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """Return the verdict in words."""
        return {True: "reproduced", False: "not reproduced", None: "not decided"}[self.holds]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One of the article's figures at toy size, with its findings and the numbers behind them.

    scale: how many runs it took, and how long they were. text: what the page says of it.
    y_limits: where the picture begins and ends; None for around all that is in it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    findings: list[Finding]
    curves: list[Curve]
    log_x: bool = False
    scale: str = ""
    text: str = ""
    y_limits: tuple[float, float] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


def sweep_jobs(scale: Scale) -> list[Job]:
    """Return the runs of the learning rate sweep."""
    return [
        Job(
            rank=rank,
            lr=lr,
            seed=seed,
            steps=scale.sweep_steps,
            pretrain_steps=scale.pretrain_steps,
        )
        for rank in (0, *RANKS)
        for lr in scale.sweep_rates
        for seed in scale.seeds
    ]


def best_rate(results: Results, like: Job, scale: Scale) -> float:
    """Return the rate with the least mean final loss of runs that differ in rate and seed only."""
    return min(scale.sweep_rates, key=lambda lr: mean(finals(results, replace(like, lr=lr), scale)))


def interpolated_rate(results: Results, like: Job, scale: Scale) -> float:
    """Return `lowest` of the mean final losses of runs that differ in rate and seed only."""
    rates = scale.sweep_rates
    return lowest({lr: mean(finals(results, replace(like, lr=lr), scale)) for lr in rates})


def lowest(losses: Mapping[float, float]) -> float:
    """Return the lowest point of the parabola, over log rate, through the best and its neighbours.

    losses: by rate, finite. At either end of the rates that is the best rate itself.
    """
    ordered = sorted(losses)
    at = ordered.index(min(ordered, key=lambda lr: losses[lr]))
    if at in (0, len(ordered) - 1):
        return ordered[at]
    near = ordered[at - 1 : at + 2]
    x, y = [math.log(lr) for lr in near], [losses[lr] for lr in near]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left == right:
        return ordered[at]
    # The slope is `left` halfway to the best from below and `right` halfway above it.
    return math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left))


def scale_of(jobs: Sequence[Job]) -> str:
    """Say how many runs there are and how long they are."""
    steps = sorted({job.steps for job in jobs})
    length = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    seeds = len({job.seed for job in jobs})
    return f"{len(set(jobs))} runs of {length} steps, {seeds} seed{'s' * (seeds > 1)}"


def finals(results: Results, like: Job, scale: Scale) -> list[float]:
    """Return the final value of each seed."""
    return [results[replace(like, seed=seed)].final for seed in scale.seeds]


def long_jobs(results: Results, scale: Scale) -> list[Job]:
    """Return the long runs, each rank at the rate that its sweep found best."""
    return [
        replace(job, lr=best_rate(results, job, scale), steps=scale.long_steps, seed=seed)
        for job in _one_each(scale)
        for seed in scale.seeds
    ]


def batch_jobs(results: Results, scale: Scale) -> list[Job]:
    """Return runs on the same number of sequences in batches of three sizes, at three rates."""
    jobs = []
    for job in _one_each(scale):
        if job.rank not in (0, 64):
            continue
        middle = best_rate(results, job, scale)
        for batch_size in (8, 32, 128):
            steps = scale.sweep_steps * 32 // batch_size
            jobs += [
                replace(job, lr=lr, batch_size=batch_size, steps=steps, seed=seed)
                for lr in _around(middle, scale)
                for seed in scale.seeds
            ]
    return jobs


PLACEMENTS: dict[Base, dict[tuple[str, ...], int]] = {
    # About 27,000 parameters each, attention the most.
    "dense": {("attn", "unembed"): 24, ("mlp", "unembed"): 16, ("all",): 10},
    # About 31,000 each, per-expert adapters of half the rank.
    "moe": {("attn", "unembed"): 28, ("mlp", "unembed"): 8, ("all",): 6},
}


def placement_jobs(base: Base, results: Results, scale: Scale) -> list[Job]:
    """Return the runs that put about the same number of parameters in different layers."""
    rank_16 = next(job for job in _one_each(scale) if job.rank == 16)
    return [
        replace(
            rank_16,
            base=base,
            targets=targets,
            rank=rank,
            lr=lr,
            steps=scale.placement_steps,
            seed=seed,
        )
        for targets, rank in PLACEMENTS[base].items()
        for lr in _around(best_rate(results, rank_16, scale), scale)
        for seed in scale.seeds
    ]


def early_jobs(results: Results, scale: Scale) -> list[Job]:
    """Return short runs of all ranks with the same seeds, at a third of the best rate and at it.

    At its best rate the toy learns in 20 steps what a large model learns in hundreds.
    """
    rate = best_rate(results, next(j for j in _one_each(scale) if j.rank == 16), scale)
    return [
        replace(job, lr=lr, steps=scale.early_steps, seed=seed)
        for lr in (rate / 3, rate)
        for job in _one_each(scale)
        if job.rank
        for seed in range(4)
    ]


def rl_sweep_jobs(scale: Scale) -> list[Job]:
    """Return short runs that are rewarded for the language that is easily told from the other."""
    return _rl_jobs("halves", scale.rl_steps, scale)


def rl_jobs(results: Results, scale: Scale) -> list[Job]:
    """Return longer runs of the same, each method at the rate that its sweep found best."""
    best = best_of(rl_sweep_jobs(scale), results)
    return [
        replace(job, steps=scale.rl_long_steps, seed=seed) for job in best for seed in scale.seeds
    ]


def rl_fact_jobs(scale: Scale) -> list[Job]:
    """Return the runs that have to learn for each pair of tokens which language is rewarded."""
    return _rl_jobs("ambiguous", scale.rl_fact_steps, scale)


def _rl_jobs(base: Base, steps: int, scale: Scale) -> list[Job]:
    return [
        Job(
            base=base,
            is_rl=True,
            rank=rank,
            lr=lr,
            seed=seed,
            steps=steps,
            pretrain_steps=scale.pretrain_steps,
        )
        for rank in RL_RANKS
        for lr in RL_RATES
        for seed in scale.seeds
    ]


def how(job: Job) -> str:
    """Name what a run trains."""
    return f"rank {job.rank}" if job.rank else "full fine-tuning"


def grouped(jobs: Sequence[Job], results: Results) -> dict[Job, list[Result]]:
    """Return the results of all seeds under the job with seed 0, in the order of the jobs."""
    groups: dict[Job, list[Result]] = {}
    for job in jobs:
        groups.setdefault(replace(job, seed=0), []).append(results[job])
    return groups


def best_of(jobs: Sequence[Job], results: Results) -> dict[Job, list[Result]]:
    """Keep of the runs that differ in their rate those of the best one.

    Best is the least mean loss, or the largest mean share of right answers.
    """
    best: dict[Job, tuple[float, Job, list[Result]]] = {}
    for job, seeds in grouped(jobs, results).items():
        score = mean(r.final for r in seeds) * (-1 if job.is_rl else 1)
        same = replace(job, lr=0.0)
        if same not in best or score < best[same][0]:
            best[same] = (score, job, seeds)
    return {job: seeds for _, job, seeds in best.values()}


def _one_each(scale: Scale) -> list[Job]:
    return sweep_jobs(scale)[:: len(scale.seeds) * len(scale.sweep_rates)]


def _around(rate: float, scale: Scale) -> tuple[float, ...]:
    at = scale.sweep_rates.index(rate)
    return scale.sweep_rates[max(0, at - 1) : at + 2]
