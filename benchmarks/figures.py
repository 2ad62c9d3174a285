"""Run the experiments of "LoRA Without Regret" at toy size and write docs/regret.md.

Runs are kept in --work, so that a run that was stopped goes on where it was.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.regret import experiments, figures, report  # noqa: E402
from benchmarks.regret.experiments import Figure, Results, Scale  # noqa: E402
from benchmarks.regret.job import Job  # noqa: E402
from benchmarks.regret.workers import run_all  # noqa: E402

# A sweep of rates, the runs that follow from its best ones, and the figure of these.
Experiment = tuple[
    Callable[[Scale], list[Job]],
    Callable[[Results, Scale], list[Job]],
    Callable[[Results, Scale], Figure],
]
SWEEP = experiments.sweep_jobs

EXPERIMENTS: dict[str, Experiment] = {
    "1": (SWEEP, experiments.long_jobs, figures.capacity_figure),
    "2": (SWEEP, lambda _results, scale: SWEEP(scale), figures.rate_figure),
    "3": (SWEEP, experiments.batch_jobs, figures.batch_figure),
    "4": (
        SWEEP,
        lambda results, scale: experiments.placement_jobs("dense", results, scale),
        lambda results, scale: figures.placement_figure("dense", results, scale),
    ),
    "5": (
        SWEEP,
        lambda results, scale: experiments.placement_jobs("moe", results, scale),
        lambda results, scale: figures.placement_figure("moe", results, scale),
    ),
    "6": (
        experiments.rl_sweep_jobs,
        lambda results, scale: [
            *experiments.rl_jobs(results, scale),
            *experiments.rl_fact_jobs(scale),
        ],
        figures.rl_figure,
    ),
    "9": (SWEEP, experiments.early_jobs, figures.early_figure),
}


def main() -> None:
    """Run the chosen figures, print a verdict for each, and write the page for all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", default=[], help="1 2 3 4 5 6 9 (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "regret")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    chosen = args.figures or list(EXPERIMENTS)
    if unknown := set(chosen) - set(EXPERIMENTS):
        parser.error(f"figures {sorted(unknown)} do not exist: choose of {' '.join(EXPERIMENTS)}")
    done = run_figures(chosen, Scale(), args.work, args.workers)
    report.write(done, args.output / "regret", args.output / "regret.md")


def run_figures(chosen: list[str], scale: Scale, work: Path, workers: int) -> list[Figure]:
    """Run the experiments behind the figures and return these, each with its verdict printed."""
    results: Results = {}
    done = []
    for name in chosen:
        sweep_of, jobs_of, figure_of = EXPERIMENTS[name]
        results |= run_all(sweep_of(scale), work, workers)
        jobs = jobs_of(results, scale)
        results |= run_all(jobs, work, workers)
        figure = replace(figure_of(results, scale), scale=experiments.scale_of(jobs))
        for found in figure.findings:
            print(f"{figure.name}, {found.verdict}: the article: {found.article};")
            print(f"    here: {found.here}", flush=True)
        done.append(figure)
    return done


if __name__ == "__main__":
    main()
