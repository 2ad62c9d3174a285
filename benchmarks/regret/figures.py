"""From results to figures: the curves to draw and a verdict by a criterion that can fail."""

from statistics import geometric_mean, mean

from benchmarks.regret.experiments import (
    Curve,
    Figure,
    Finding,
    Results,
    Scale,
    batch_jobs,
    best_of,
    early_jobs,
    grouped,
    how,
    interpolated_rate,
    long_jobs,
    placement_jobs,
    rl_fact_jobs,
    rl_jobs,
    sweep_jobs,
)
from benchmarks.regret.job import GROUP_SIZE, Base, Job, Result

SMOOTHING = 25
RL_SMOOTHING = 5
# A difference in held-out loss (nats) that counts; seeds differ by about a tenth of it.
VISIBLE = 0.05
# A relative difference between curves that does not count.
CLOSE = 0.01
LOSS = "loss (nats per token)"


def capacity_figure(results: Results, scale: Scale) -> Figure:
    """Figure 1: low ranks fall behind when their capacity is used up."""
    runs = grouped(long_jobs(results, scale), results)
    loss = {job.rank: _final(seeds) for job, seeds in runs.items()}
    ordered = all(loss[low] - loss[high] > VISIBLE for low, high in ((1, 4), (4, 16), (16, 64)))
    return Figure(
        name="figure-1",
        title="Loss by rank, each at its best rate",
        x_label="step",
        y_label=LOSS,
        log_x=True,
        findings=[
            Finding(
                article="high ranks learn like full fine-tuning; low ones fall off when full",
                here=f"held-out loss after {scale.long_steps} steps: {_listed(loss)}",
                holds=ordered and loss[64] - loss[0] < VISIBLE,
            )
        ],
        curves=[curve_of(how(job), seeds, SMOOTHING) for job, seeds in runs.items()],
        numbers={"held_out": loss},
    )


def rate_figure(results: Results, scale: Scale) -> Figure:
    """Figure 2: the best rate is the same at all ranks, and ten times that of full fine-tuning."""
    groups = grouped(sweep_jobs(scale), results)
    by_rank: dict[int, dict[float, list[Result]]] = {}
    for job, seeds in groups.items():
        by_rank.setdefault(job.rank, {})[job.lr] = seeds
    best = {
        job.rank: interpolated_rate(results, job, scale)
        for job in groups
        if job.lr == scale.sweep_rates[0]
    }
    ranks = [rank for rank in best if rank >= 4]
    lora = [best[rank] for rank in ranks]
    spread, ratio = max(lora) / min(lora), geometric_mean(lora) / best[0]
    return Figure(
        name="figure-2",
        title=f"Held-out loss by learning rate, {scale.sweep_steps} steps",
        x_label="learning rate",
        y_label=LOSS,
        log_x=True,
        findings=[
            Finding(
                article="the best rate moves less than 2 x from rank 4 to 512",
                here=f"it moves {spread:.2g} x from rank {min(ranks)} to {max(ranks)}; best rates "
                f"{_listed(best)}, interpolated on a grid of half decades",
                holds=spread < 2,
            ),
            Finding(
                article="the best rate of LoRA is about 10 times that of full fine-tuning",
                here=f"{ratio:.2g} times",
                holds=5 <= ratio <= 20,
            ),
        ],
        curves=[
            Curve(
                label=f"rank {rank}" if rank else "full fine-tuning",
                x=list(rates),
                seeds=turned([[r.final for r in seeds] for seeds in rates.values()]),
            )
            for rank, rates in by_rank.items()
        ],
        numbers={"best_rates": best, "spread": spread, "ratio": ratio},
    )


def batch_figure(results: Results, scale: Scale) -> Figure:
    """Figure 3: LoRA loses more than full fine-tuning does in large batches."""
    loss: dict[tuple[int, int], list[float]] = {
        (job.rank, job.batch_size): [r.final for r in seeds]
        for job, seeds in best_of(batch_jobs(results, scale), results).items()
    }
    sizes = sorted({size for _, size in loss})
    gap = {size: mean(loss[64, size]) - mean(loss[0, size]) for size in sizes}
    return Figure(
        name="figure-3",
        title="Held-out loss by batch size, the same number of sequences",
        x_label="batch size",
        y_label=LOSS,
        log_x=True,
        findings=[
            Finding(
                article="LoRA falls behind full fine-tuning as the batch grows",
                here=f"loss of rank 64 less that of full fine-tuning: {_listed(gap, 'batch')}",
                holds=gap[sizes[-1]] > VISIBLE and gap[sizes[-1]] - gap[sizes[0]] > VISIBLE,
            )
        ],
        curves=[
            Curve(
                label=f"rank {rank}" if rank else "full fine-tuning",
                x=[float(size) for size in sizes],
                seeds=turned([loss[rank, size] for size in sizes]),
            )
            for rank in (0, 64)
        ],
        numbers={"gap": gap},
    )


def placement_figure(base: Base, results: Results, scale: Scale) -> Figure:
    """Figures 4 and 5: attention alone is worse than the MLP alone at the same size."""
    runs = best_of(placement_jobs(base, results, scale), results)
    loss = {_where(job): _final(seeds) for job, seeds in runs.items()}
    size = {_where(job): seeds[0].trainable for job, seeds in runs.items()}
    gain = loss["MLP"] - loss["all"]
    described = ", ".join(f"{name} {loss[name]:.3f} ({size[name]:,} parameters)" for name in loss)
    return Figure(
        name="figure-5" if base == "moe" else "figure-4",
        title=f"Where the adapters are, {'experts' if base == 'moe' else 'dense model'}",
        x_label="step",
        y_label=LOSS,
        findings=[
            Finding(
                article="attention alone is worse than the MLP alone, at the same parameters",
                here=f"held-out loss {described}",
                holds=loss["attention"] - loss["MLP"] > VISIBLE
                and size["attention"] >= size["MLP"],
            ),
            Finding(
                article="both together are hardly better than the MLP alone",
                here=f"{abs(gain):.3f} nats {'better' if gain > 0 else 'worse'}",
                holds=gain < VISIBLE,
            ),
        ],
        curves=[curve_of(_where(job), seeds, SMOOTHING) for job, seeds in runs.items()],
        numbers={"held_out": loss, "trainable": size},
    )


def early_figure(results: Results, scale: Scale) -> Figure:
    """Figure 9: the first steps do not depend on the rank."""
    runs = grouped(early_jobs(results, scale), results)
    curves = {(job.lr, job.rank): _middle(seeds) for job, seeds in runs.items()}
    apart: dict[float, dict[int, float]] = {lr: {} for lr, _ in curves}
    for (lr, rank), curve in curves.items():
        pairs = zip(curve, curves[lr, 64], strict=True)
        apart[lr][rank] = max(abs(a - b) / b for a, b in pairs)
    return Figure(
        name="figure-9",
        title="The first steps of all ranks, at two rates",
        x_label="step",
        y_label=LOSS,
        findings=[
            Finding(
                article="early in training the curves of different ranks lie on each other "
                "(judged here by rank 16 against 64)",
                here=f"rate {lr:g}: largest distance from rank 64 in {scale.early_steps} steps, "
                f"mean of 4 starts, {', '.join(f'rank {r} {d:.1%}' for r, d in far.items())}",
                holds=far[16] < CLOSE,
            )
            for lr, far in apart.items()
        ],
        curves=[curve_of(f"{how(job)}, rate {job.lr:g}", seeds, 1) for job, seeds in runs.items()],
        numbers={"distance": {f"{lr:g}": far for lr, far in apart.items()}},
    )


def rl_figure(results: Results, scale: Scale) -> Figure:
    """Figure 6: in reinforcement learning small ranks do what full fine-tuning does."""
    runs = grouped(rl_jobs(results, scale), results)
    facts = best_of(rl_fact_jobs(scale), results)
    right, fact_right = _by_rank(runs), _by_rank(facts)
    start, fact_start = _start(runs), _start(facts)
    # Where full fine-tuning has not learned, equality says nothing.
    as_well = (right[1] > right[0] - 0.05) if right[0] - start > 0.2 else None
    parameters = next(seeds[0].trainable for job, seeds in runs.items() if job.rank == 1)
    episodes = scale.rl_fact_steps * next(iter(facts)).batch_size * GROUP_SIZE
    return Figure(
        name="figure-6",
        title="Reinforcement learning: the rewarded language",
        x_label="step",
        y_label="share of right answers",
        findings=[
            Finding(
                article="rank 1 learns as well as full fine-tuning",
                here="the rewarded language is the one of the upper half of the vocabulary; share "
                f"of right answers at the end: {_listed(right)}; {start:.2f} at the start",
                holds=as_well,
            ),
            Finding(
                article="its reason, about 1 bit an episode against 2 a parameter, means that "
                "rank 1 falls behind where more has to be learned (not tried there)",
                here="which language is rewarded has to be learned for each of 4,096 pairs of "
                f"tokens, {episodes:,} episodes for the {parameters:,} parameters of rank 1; share "
                f"at the end: {_listed(fact_right)}; {fact_start:.2f} at the start",
                # Where rank 1 falls behind anyway, this is not for want of capacity.
                holds=(fact_right[1] < fact_right[0] - 0.05)
                if as_well and fact_right[0] - fact_start > 0.2
                else None,
            ),
        ],
        curves=[
            curve_of(f"{how(job)}, {name}", seeds, RL_SMOOTHING)
            for name, group in (("halves", runs), ("facts", facts))
            for job, seeds in group.items()
        ],
        numbers={
            "final": right,
            "start": start,
            "rates": {f"{j.base}, {how(j)}": j.lr for j in (*runs, *facts)},
            "facts": fact_right,
            "facts_start": fact_start,
        },
    )


def _by_rank(runs: dict[Job, list[Result]]) -> dict[int, float]:
    return {job.rank: _final(seeds) for job, seeds in runs.items()}


def _start(runs: dict[Job, list[Result]]) -> float:
    """Return the mean of the first five steps."""
    return mean(mean(r.curve[:5]) for seeds in runs.values() for r in seeds)


def _final(seeds: list[Result]) -> float:
    return mean(result.final for result in seeds)


def _middle(seeds: list[Result]) -> list[float]:
    """Return the mean curve."""
    return [mean(values) for values in turned([result.curve for result in seeds])]


def turned(rows: list[list[float]]) -> list[list[float]]:
    """Return the columns of rows."""
    return [list(column) for column in zip(*rows, strict=True)]


def _where(job: Job) -> str:
    return {"attn": "attention", "mlp": "MLP", "all": "all"}[job.targets[0]]


def curve_of(label: str, seeds: list[Result], window: int) -> Curve:
    """Return the training curves of all seeds, each point the mean of `window` steps."""
    lines = [_smoothed(result.curve, window) for result in seeds]
    return Curve(
        label=label, x=[float(window * (i + 1)) for i in range(len(lines[0]))], seeds=lines
    )


def _smoothed(values: list[float], window: int) -> list[float]:
    """Return the means of consecutive windows."""
    return [mean(values[i : i + window]) for i in range(0, len(values) - window + 1, window)]


def _listed(values: dict[int, float], noun: str = "rank") -> str:
    return ", ".join(
        f"full fine-tuning {value:.3g}"
        if noun == "rank" and key == 0
        else f"{noun} {key} {value:.3g}"
        for key, value in values.items()
    )
