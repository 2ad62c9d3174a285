"""Figures from the runs on a pretrained model; verdicts know the uncertainty of their seeds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean, stdev

from benchmarks.regret.experiments import (
    Curve,
    Figure,
    Finding,
    Results,
    how,
    lowest,
    scale_of,
)
from benchmarks.regret.figures import CLOSE, LOSS, curve_of
from benchmarks.regret.job import Job, Norms, Result
from benchmarks.regret.real import (
    BATCH_SIZES,
    MIDDLE,
    PLACEMENTS,
    RANKS,
    RealScale,
    batch_jobs,
    batch_method,
    best_rate,
    mean_loss,
    placement_jobs,
    placement_method,
    precision_pairs,
    rates,
    sweep_jobs,
)

# A difference in held-out loss (nats) that counts.
VISIBLE = 0.02
WIDEST = RANKS[-1]
# Of the least loss: a picture of what diverged would show no differences.
SHOWN = (0.99, 1.15)
BEYOND = (
    f"The picture ends at {SHOWN[1]} times the least loss, which lines leave at too high a rate.\n"
)
PLACES = {("attn",): "attention", ("mlp",): "MLP", ("attn", "mlp"): "both"}


@dataclass(frozen=True)
class Seeds:
    """A number of each seed: its mean, and twice its standard error."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return mean(self.values)

    @property
    def error(self) -> float:
        """Return twice the standard error of the mean, infinite for one seed."""
        if len(self.values) < 2:
            return math.inf
        return 2 * stdev(self.values) / math.sqrt(len(self.values))

    def within(self, low: float, high: float) -> bool | None:
        """Say whether the number lies between two limits, None where its error leaves that open."""
        first, last = self.mean - self.error, self.mean + self.error
        if low <= first and last <= high:
            return True
        return False if last < low or high < first else None

    def said(self, form: str = ".3f", of: Callable[[float], float] = float) -> str:
        """Return the mean and, in brackets, each seed's number where there are several."""
        if len(self.values) == 1:
            return f"{of(self.mean):{form}}"
        each = ", ".join(f"{of(value):{form}}" for value in self.values)
        return f"{of(self.mean):{form}} ({each})"


def seeds_of(value: Callable[[int], float], scale: RealScale) -> Seeds:
    """Return a number of every seed."""
    return Seeds(tuple(value(seed) for seed in scale.seeds))


def runs_of(method: Job, results: Results, scale: RealScale, seed: int) -> dict[float, Result]:
    """Return a method's runs of one seed, by rate."""
    grid = rates(method, results, scale)
    return {lr: results[replace(method, lr=lr, seed=seed)] for lr in grid}


def rate_figure(results: Results, scale: RealScale) -> Figure:
    """Figure 2: the best rate is the same at all ranks, and ten times that of full fine-tuning."""
    methods = (0, *RANKS)
    best = {
        rank: seeds_of(lambda seed, rank=rank: _best(rank, seed, results, scale), scale)
        for rank in methods
    }
    ratio = seeds_of(lambda seed: _log_ratio(best, scale.seeds.index(seed)), scale)
    earlier = {
        f"{first}-{last}": seeds_of(
            lambda seed, w=(first, last): _ratio_after(w, seed, results, scale), scale
        )
        for first, last in _windows(scale)
    }
    curves = [_by_rate(_named(rank), rank, results, scale, _held_out) for rank in methods]
    losses = (loss for curve in curves for seed in curve.seeds for loss in seed)
    least = min(filter(math.isfinite, losses))
    return Figure(
        name="figure-2",
        title=f"Held-out loss by learning rate, {scale.steps} steps",
        x_label="learning rate",
        y_label=LOSS,
        log_x=True,
        findings=[_moved(best), _factor(ratio, earlier)],
        curves=curves,
        scale=scale_of(sweep_jobs(results, scale)),
        text=BEYOND,
        y_limits=(SHOWN[0] * least, SHOWN[1] * least),
        numbers={
            "best_rates": {_named(rank): found.values for rank, found in best.items()},
            "ratio": [math.exp(value) for value in ratio.values],
            "ratio_by_training_loss": {
                steps: [math.exp(value) for value in found.values]
                for steps, found in earlier.items()
            },
        },
    )


def _moved(best: Mapping[int, Seeds]) -> Finding:
    moved = Seeds(
        tuple(
            abs(math.log(wide / middle))
            for wide, middle in zip(best[WIDEST].values, best[MIDDLE].values, strict=True)
        )
    )
    listed = ", ".join(f"{_named(rank)} {found.said('.2g')}" for rank, found in best.items())
    return Finding(
        article="the best rate moves less than 2 x from rank 4 to 512 (judged here by "
        f"rank {MIDDLE} and {WIDEST})",
        here=f"it moves {moved.said('.2g', math.exp)} x; best rates {listed}, interpolated on a "
        "grid of half decades",
        holds=moved.within(-math.inf, math.log(2)),
    )


def _factor(ratio: Seeds, earlier: Mapping[str, Seeds]) -> Finding:
    listed = ", ".join(
        f"steps {steps} {found.said('.2g', math.exp)}" for steps, found in earlier.items()
    )
    return Finding(
        article="the best rate of LoRA is about 10 times that of full fine-tuning (judged here by "
        "5 to 20 times)",
        here=f"{ratio.said('.2g', math.exp)} times, ranks taken together; by the training loss of "
        f"{listed}",
        holds=ratio.within(math.log(5), math.log(20)),
    )


def batch_figure(results: Results, scale: RealScale) -> Figure:
    """Figure 3: LoRA loses more than full fine-tuning does in large batches."""
    best = {
        (rank, size): _best_runs(batch_method(rank, size, scale), results, scale)
        for rank in (0, MIDDLE)
        for size in BATCH_SIZES
    }
    loss = {method: Seeds(tuple(run.final for run in of)) for method, of in best.items()}
    gap = {size: _less(loss[MIDDLE, size], loss[0, size]) for size in BATCH_SIZES}
    return Figure(
        name="figure-3",
        title="Held-out loss by batch size, the same rows",
        x_label="rows in a batch",
        y_label=LOSS,
        log_x=True,
        findings=[_gap_by_batch(gap)],
        curves=[
            Curve(
                label=_named(rank),
                x=[float(size) for size in BATCH_SIZES],
                seeds=[
                    list(of)
                    for of in zip(*(loss[rank, s].values for s in BATCH_SIZES), strict=True)
                ],
            )
            for rank in (0, MIDDLE)
        ],
        scale=scale_of(batch_jobs(results, scale)),
        text=_rates_by_batch(results, scale),
        numbers={"gap": {size: found.values for size, found in gap.items()}},
    )


def _gap_by_batch(gap: Mapping[int, Seeds]) -> Finding:
    growth = _less(gap[BATCH_SIZES[-1]], gap[BATCH_SIZES[0]])
    listed = ", ".join(f"batch {size} {found.said()}" for size, found in gap.items())
    return Finding(
        article="LoRA falls behind full fine-tuning as the batch grows (judged here by "
        f"{VISIBLE} nats more)",
        here=f"held-out loss of rank {MIDDLE} less that of full fine-tuning, each at its best "
        f"rate: {listed}; from the smallest batch to the largest it grows by {growth.said()}",
        holds=growth.within(VISIBLE, math.inf),
    )


def _rates_by_batch(results: Results, scale: RealScale) -> str:
    listed = "; ".join(
        f"{_named(rank)} "
        + ", ".join(
            f"{best_rate(batch_method(rank, size, scale), results, scale):g} in batches of {size}"
            for size in BATCH_SIZES
        )
        for rank in (0, MIDDLE)
    )
    updates = ", ".join(str(batch_method(0, size, scale).steps) for size in BATCH_SIZES)
    return (
        f"The rate with the least mean loss, inside its grid, is of {listed}. All runs see the "
        f"same {scale.steps * scale.batch_size} rows once, in {updates} updates; the article's "
        "were longer.\n"
    )


def placement_figure(results: Results, scale: RealScale) -> Figure:
    """Figure 4: attention alone is worse than the MLP alone at the same size."""
    best = {
        PLACES[targets]: _best_runs(placement_method(targets, scale), results, scale)
        for targets in PLACEMENTS
    }
    loss = {name: Seeds(tuple(run.final for run in of)) for name, of in best.items()}
    size = {name: of[0].trainable for name, of in best.items()}
    behind, gain = _less(loss["attention"], loss["MLP"]), _less(loss["MLP"], loss["both"])
    listed = ", ".join(f"{n} {loss[n].said()} ({size[n]:,} parameters)" for n in loss)
    return Figure(
        name="figure-4",
        title=f"Where the adapters are, {scale.steps} steps",
        x_label="step",
        y_label=LOSS,
        findings=[
            Finding(
                article="attention alone is worse than the MLP alone, at the same parameters",
                here=f"held-out loss {listed}; attention is worse by {behind.said()}",
                holds=behind.within(0, math.inf),
            ),
            Finding(
                article="both together are hardly better than the MLP alone (judged here by "
                f"{VISIBLE} nats)",
                here=f"better by {gain.said()}",
                holds=gain.within(-math.inf, VISIBLE),
            ),
        ],
        curves=[curve_of(name, of, 4) for name, of in best.items()],
        scale=scale_of(placement_jobs(results, scale)),
        numbers={"held_out": {n: found.values for n, found in loss.items()}, "parameters": size},
    )


def early_figure(results: Results, scale: RealScale) -> Figure:
    """Figure 9: at first all ranks learn alike. The runs are those of the sweep."""
    common = set.intersection(*(set(rates(scale.method(rank), results, scale)) for rank in RANKS))
    chosen = sorted(common)[:2]
    far = {
        lr: {
            rank: seeds_of(lambda seed, r=rank, x=lr: _distance(r, x, seed, results, scale), scale)
            for rank in RANKS[:-1]
        }
        for lr in chosen
    }
    runs = {
        f"rank {rank}, rate {lr:g}": [scale.job(rank, lr, seed) for seed in scale.seeds]
        for lr in chosen
        for rank in RANKS
    }
    return Figure(
        name="figure-9",
        title="The first steps of all ranks",
        x_label="step",
        y_label=LOSS,
        findings=[
            Finding(
                article="early in training the curves of different ranks lie on each other "
                f"(judged here by rank {MIDDLE} against {WIDEST}, {CLOSE:.0%})",
                here=f"rate {lr:g}: largest distance from rank {WIDEST} in {scale.steps} steps: "
                + ", ".join(f"rank {rank} {found.said('.1%')}" for rank, found in of_rank.items()),
                holds=of_rank[MIDDLE].within(-math.inf, CLOSE),
            )
            for lr, of_rank in far.items()
        ],
        curves=[curve_of(name, [results[job] for job in jobs], 1) for name, jobs in runs.items()],
        scale=scale_of([job for jobs in runs.values() for job in jobs]),
        numbers={
            "distance": {
                f"{lr:g}": {rank: found.values for rank, found in of_rank.items()}
                for lr, of_rank in far.items()
            }
        },
    )


def _distance(rank: int, lr: float, seed: int, results: Results, scale: RealScale) -> float:
    """Return the largest relative distance of a curve from that of the widest rank."""
    one, other = (results[scale.job(r, lr, seed)].curve for r in (rank, WIDEST))
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def norm_figure(results: Results, scale: RealScale) -> Figure:
    """Compare the spectral norms of A and B, which start at about 1 and at 0, at the end."""

    def at_best(rank: int, of: Callable[[Norms], float]) -> Seeds:
        lr = best_rate(scale.method(rank), results, scale)
        return seeds_of(lambda seed: of(_norms(results[scale.job(rank, lr, seed)])), scale)

    share = {rank: at_best(rank, lambda n: n.b_above_a) for rank in RANKS}
    listed = "; ".join(
        f"rank {rank} at {best_rate(scale.method(rank), results, scale):g}: "
        f"A {at_best(rank, lambda n: n.a).said('.2f')}, "
        f"B {at_best(rank, lambda n: n.b).said('.2f')}, above A in "
        f"{share[rank].said('.0%')} of the modules, alpha / r B A "
        f"{at_best(rank, lambda n: n.relative).said('.1%')} of the base weight"
        for rank in RANKS
    )
    most = [share[rank].within(0.5, math.inf) for rank in RANKS]
    jobs = [job for job in sweep_jobs(results, scale) if job.rank]
    modules = _norms(results[jobs[0]]).modules
    return Figure(
        name="norms",
        title=f"Spectral norm of B over that of A after {scale.steps} steps",
        x_label="learning rate",
        y_label="mean of B / mean of A",
        log_x=True,
        findings=[
            Finding(
                article="B's spectral norm ends above A's (judged here by most of the modules at "
                "every rank)",
                here=f"at the best rates, mean of {modules} modules: {listed}",
                holds=False if False in most else True if all(most) else None,
            )
        ],
        curves=[
            _by_rate(f"rank {rank}", rank, results, scale, lambda r: _norms(r).b / _norms(r).a)
            for rank in RANKS
        ],
        scale=scale_of(jobs),
        text=_by_the_rate(results, scale),
        numbers={"b_above_a": {rank: found.values for rank, found in share.items()}},
    )


def _by_the_rate(results: Results, scale: RealScale) -> str:
    """Say what higher rates do, as they decide how far B, which starts at zero, has come."""
    top = {rank: rates(scale.method(rank), results, scale)[-1] for rank in RANKS}
    listed = ", ".join(
        f"rank {rank} at {lr:g} "
        + seeds_of(
            lambda seed, r=rank, x=lr: _norms(results[scale.job(r, x, seed)]).b_above_a, scale
        ).said(".0%")
        for rank, lr in top.items()
    )
    return (
        "B starts at zero, and how far it comes is a matter of rate and length: at the highest "
        f"rate of each grid, which learns worse than the best one, it ends above A in {listed} of "
        "the modules.\n"
    )


def precision_figure(results: Results, scale: RealScale) -> Figure:
    """Compare runs of the same rows, rates and start values in bf16 and in fp32."""
    pairs = precision_pairs(scale)
    apart = [
        [abs(a - b) / b for a, b in zip(results[s].curve, results[p].curve, strict=True)]
        for p, s in pairs
    ]
    far = [max(distances) for distances in apart]
    listed = "; ".join(
        f"{how(plain)} at {plain.lr:g}: distance of the training loss {max(distances):.1%} at most "
        f"(step {distances.index(max(distances)) + 1}), {mean(distances):.1%} in the mean, "
        f"{distances[-1]:.1%} at the end, "
        f"held-out loss {results[short].final:.4f} in bf16 and {results[plain].final:.4f} in fp32"
        f"{_slower(plain, short, results)}"
        for (plain, short), distances in zip(pairs, apart, strict=True)
    )
    return Figure(
        name="precision",
        title="The same runs in bf16 and fp32",
        x_label="step",
        y_label=LOSS,
        findings=[
            Finding(
                article="(not the article's) bf16, with Adam's weights in fp32, learns as fp32 "
                f"does: the curves are within {CLOSE:.0%}",
                here=listed,
                holds=max(far) < CLOSE,
            )
        ],
        curves=[
            curve_of(f"{how(job)}, {job.precision}", [results[job]], 1)
            for pair in pairs
            for job in pair
        ],
        scale=scale_of([job for pair in pairs for job in pair]),
        numbers={"distance": far},
    )


def _slower(plain: Job, short: Job, results: Results) -> str:
    """Say how much more processor time a step takes in fp32."""
    times = [_time(job, results) for job in (plain, short)]
    if not all(times):
        return ""
    return f", processor time of a step in fp32 {mean(times[0]) / mean(times[1]):.2f} x"


def _time(job: Job, results: Results) -> list[float]:
    """Return the processor seconds of a job's steps, and of jobs that differ in rate and seed."""
    like = replace(job, lr=0.0, seed=0)
    return [
        result.cpu_seconds
        for other, result in results.items()
        if replace(other, lr=0.0, seed=0) == like and result.cpu_seconds is not None
    ]


def _named(rank: int) -> str:
    return f"rank {rank}" if rank else "full fine-tuning"


def _held_out(result: Result) -> float:
    return result.final


def _norms(result: Result) -> Norms:
    assert result.norms is not None
    return result.norms


def _best_runs(method: Job, results: Results, scale: RealScale) -> list[Result]:
    """Return of each seed the run at the rate that is best for it."""
    by_seed = (runs_of(method, results, scale, seed).values() for seed in scale.seeds)
    return [min(runs, key=lambda run: mean_loss([run])) for runs in by_seed]


def _less(first: Seeds, second: Seeds) -> Seeds:
    return Seeds(tuple(a - b for a, b in zip(first.values, second.values, strict=True)))


def _by_rate(
    label: str, rank: int, results: Results, scale: RealScale, of: Callable[[Result], float]
) -> Curve:
    grid = rates(scale.method(rank), results, scale)
    seeds = [
        [of(runs_of(scale.method(rank), results, scale, seed)[lr]) for lr in grid]
        for seed in scale.seeds
    ]
    return Curve(label=label, x=list(grid), seeds=seeds)


def _best(rank: int, seed: int, results: Results, scale: RealScale) -> float:
    runs = runs_of(scale.method(rank), results, scale, seed)
    return _lowest({lr: run.final for lr, run in runs.items()})


def _lowest(losses: Mapping[float, float]) -> float:
    """Return `lowest` of the runs that have not lost their numbers."""
    return lowest({lr: loss for lr, loss in losses.items() if math.isfinite(loss)})


def _log_ratio(best: Mapping[int, Seeds], at: int) -> float:
    """Return the log of the geometric mean of all ranks' best rates over full fine-tuning's."""
    return mean(math.log(best[rank].values[at] / best[0].values[at]) for rank in RANKS)


def _windows(scale: RealScale) -> list[tuple[int, int]]:
    """Return the second half of each of the first quarter, half and whole of the steps."""
    return [(scale.steps // part // 2 + 1, scale.steps // part) for part in (4, 2, 1)]


def _ratio_after(window: tuple[int, int], seed: int, results: Results, scale: RealScale) -> float:
    """Return the log of the ratio as the training loss of some steps has it."""
    first, last = window
    best = {}
    for rank in (0, *RANKS):
        runs = runs_of(scale.method(rank), results, scale, seed)
        losses = {lr: mean(run.curve[first - 1 : last]) for lr, run in runs.items()}
        best[rank] = Seeds((_lowest(losses),))
    return _log_ratio(best, 0)
