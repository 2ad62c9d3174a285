"""Run the article's experiments on a pretrained model, and write what there is of their figures."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.regret import real_figures as figures
from benchmarks.regret import real_rl, report
from benchmarks.regret.experiments import Figure, Results
from benchmarks.regret.job import HELD_OUT_ROWS, Job
from benchmarks.regret.real import (
    RealScale,
    batch_jobs,
    placement_jobs,
    precision_jobs,
    sweep_jobs,
)
from benchmarks.regret.workers import run_all, stored

JobsOf = Callable[[Results, RealScale], list[Job]]
# The runs of a figure, and the figure of them and of the sweep.
Experiment = tuple[JobsOf, Callable[[Results, RealScale], Figure]]
# In the order of their runs.
EXPERIMENTS: dict[str, Experiment] = {
    "2": (sweep_jobs, figures.rate_figure),
    "9": (sweep_jobs, figures.early_figure),
    "norms": (sweep_jobs, figures.norm_figure),
    "precision": (lambda _, scale: precision_jobs(scale), figures.precision_figure),
    "4": (placement_jobs, figures.placement_figure),
    "3": (batch_jobs, figures.batch_figure),
}
REINFORCEMENT = "6"
KNOWN = (*EXPERIMENTS, REINFORCEMENT)
TITLES = {"smollm2": "SmolLM2-135M-Instruct"}
TEXT = """\
`make figures MODEL={model}{more}` ran this on {{date}} with {{versions}}.

A pretrained model, {title}, learns what the functions and classes of Python's standard library do:
`--dataset stdlib-docstrings` of the examples, a question and its answer in the model's own tokens,
several of them packed into a row of {seq_length} tokens, the loss on the answers alone. A run is
{steps} steps of {batch_size} rows; the held-out loss is that of {held_out} rows whose questions and
answers are in no row of the training. Every run has the same constant
rate from start to end, Adam (0.9, 0.95) and no weight decay. It computes in {precision}, with
Adam's weights and the sums of gradients in fp32. Alpha is 32 at every rank. Seeds differ in the
order of the rows and in the adapters' start values; methods do not differ in the former.

Adapters are on all linears and on the unembedding, but in figure 4. Full fine-tuning trains the
weights of the same linears and nothing else: neither norms nor the embedding. This model has one
table for embedding and unembedding; for every run here the unembedding is a copy of its own, for
an adapter on it changes the logits and not the embedding.

A method's grid of rates starts with three, half a decade apart, and grows where the best rate, of a
seed or of their mean, is one of its ends. A number stands before those of its seeds, in brackets. A
verdict is given where the mean, more or less twice its standard error over seeds, lies on one side
of the limit; with one seed there is none, and where that stays open it says so.{seeds}
"""
FEWER = " A figure has as many of these {number} seeds as have run whole."


def run(chosen: Sequence[str], scale: RealScale, hf_model: Path, work: Path, workers: int) -> None:
    """Run what the chosen figures need and has not run yet."""
    results: Results = {}
    for jobs in stages(chosen, results, scale):
        results |= run_all(jobs, work, workers, hf_model=hf_model)


def stages(chosen: Sequence[str], results: Results, scale: RealScale) -> Iterator[list[Job]]:
    """Yield what has to run next; `results` must have it before the next stage is asked for."""
    if set(chosen) - {REINFORCEMENT}:
        yield from _stages_of_text(chosen, results, scale)
    if REINFORCEMENT in chosen:
        yield from real_rl.stages(results, scale)


def _stages_of_text(
    chosen: Sequence[str], results: Results, scale: RealScale
) -> Iterator[list[Job]]:
    for part in (replace(scale, seeds=scale.seeds[:1]), scale):
        for name, (jobs_of, _) in EXPERIMENTS.items():
            if name in chosen:
                yield from _until_whole(jobs_of, results, part)


def _until_whole(jobs_of: JobsOf, results: Results, scale: RealScale) -> Iterator[list[Job]]:
    """Yield what is missing until results ask for no more: grids grow."""
    while missing := [job for job in jobs_of(results, scale) if job not in results]:
        yield missing


def found(jobs_of: JobsOf, scale: RealScale, work: Path) -> tuple[Results, RealScale | None]:
    """Return the results of runs on disk, and the scale with the seeds that have them whole."""
    results: Results = {}
    while more := stored([j for j in jobs_of(results, scale) if j not in results], work):
        results |= more
    for number in range(len(scale.seeds), 0, -1):
        part = replace(scale, seeds=scale.seeds[:number])
        if all(job in results for job in jobs_of(results, part)):
            return results, part
    return results, None


def write(chosen: Sequence[str], scale: RealScale, work: Path, output: Path) -> list[Figure]:
    """Write the chosen figures whose runs are there, print their verdicts, and the page of all.

    A figure has the seeds that are whole; one without any is named and left out.
    """
    swept, _ = found(sweep_jobs, scale, work)
    done = []
    for name in chosen:
        if name == REINFORCEMENT:
            figure = real_rl.figure(lambda jobs: stored(jobs, work), scale)
        else:
            jobs_of, figure_of = EXPERIMENTS[name]
            own, part = found(jobs_of, scale, work)
            figure = part and figure_of(swept | own, part)
        if figure is None:
            print(f"{name}: left out, its runs are not complete", flush=True)
            continue
        report.tell(figure)
        done.append(figure)
    folder = output / "regret" / scale.model
    report.save(done, folder, about(scale))
    report.write_page(output / "regret", output / "regret.md")
    return done


def about(scale: RealScale) -> report.About:
    """Describe the model and its runs."""
    title, number = TITLES.get(scale.model, scale.model), len(scale.seeds)
    is_default = number == len(RealScale(model=scale.model).seeds)
    text = TEXT.format(
        model=scale.model,
        more="" if is_default else f' FIGURES="--seeds {number}"',
        seeds="" if is_default else FEWER.format(number=number),
        title=title,
        seq_length=scale.seq_length,
        steps=scale.steps,
        batch_size=scale.batch_size,
        held_out=HELD_OUT_ROWS,
        precision=scale.precision,
    )
    paragraphs = [textwrap.fill(part, 100) for part in report.dated(text).split("\n\n")]
    return report.About(title=title, text="\n\n".join(paragraphs) + "\n")
