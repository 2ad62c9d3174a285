"""Run the experiments of "LoRA Without Regret" and write docs/regret.md.

At toy size, or with --model smollm2 on the pretrained model in build/smollm2. Runs are kept in
--work, so that a run that was stopped goes on where it was. The page shows both scales, of the one
that has not run what an earlier run left in docs/regret.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.regret import experiments, figures, real_page, report  # noqa: E402
from benchmarks.regret.experiments import Figure, Results, Scale  # noqa: E402
from benchmarks.regret.job import Job  # noqa: E402
from benchmarks.regret.real import RealScale  # noqa: E402
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


TOY = "toy"


def main() -> None:
    """Run the chosen figures, print a verdict for each, and write the page for all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "figures", nargs="*", default=[], help="1 2 3 4 5 6 9; of a model 2 9 norms precision 4 3 6"
    )
    add("--model", default=TOY, help="toy, or the name of a directory in build/ (default: toy)")
    add("--hf-model", type=Path, help="a Hugging Face directory elsewhere")
    add("--work", type=Path, help="folder of the runs (default: build/regret, or with -MODEL)")
    add("--output", type=Path, default=ROOT / "docs")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    add("--steps", type=int, help="steps of a run of a model (default: 32)")
    add("--seeds", type=int, help="seeds of a model's runs (default: 2)")
    add("--precision", choices=("bf16", "fp32"), help="of a model's runs (default: bf16)")
    add("--write-only", action="store_true", help="run nothing: write a model's complete figures")
    args = parser.parse_args()
    of_model = args.hf_model is not None or args.model != TOY
    known = real_page.KNOWN if of_model else tuple(EXPERIMENTS)
    chosen = args.figures or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"figures {sorted(unknown)} do not exist: choose of {' '.join(known)}")
    if of_model:
        real(args, chosen, parser)
    else:
        work = args.work or ROOT / "build" / "regret"
        done = run_figures(chosen, Scale(), work, args.workers)
        report.save(
            done,
            args.output / "regret",
            report.About(title="The toy", text=report.dated(report.TOY)),
        )
        report.write_page(args.output / "regret", args.output / "regret.md")


def real(args: argparse.Namespace, chosen: list[str], parser: argparse.ArgumentParser) -> None:
    """Run the chosen figures on a pretrained model, and write them and the page."""
    hf_model = (args.hf_model or ROOT / "build" / args.model).resolve()
    if not args.write_only and not (hf_model / "config.json").is_file():
        parser.error(
            f"{hf_model} has no config.json: `make figures MODEL=smollm2` writes build/smollm2, or "
            "give a Hugging Face directory by --hf-model"
        )
    given = {"steps": args.steps, "precision": args.precision}
    if args.seeds:
        given["seeds"] = tuple(range(args.seeds))
    scale = RealScale(model=hf_model.name, **{k: v for k, v in given.items() if v is not None})
    work = args.work or ROOT / "build" / f"regret-{scale.model}"
    if not args.write_only:
        real_page.run(chosen, scale, hf_model, work, args.workers)
    real_page.write(chosen, scale, work, args.output)


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
        report.tell(figure)
        done.append(figure)
    return done


if __name__ == "__main__":
    main()
