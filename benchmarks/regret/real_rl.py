"""Figure 6 on a pretrained model: the runs of reinforcement learning, and what they say."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.regret.experiments import Figure, Finding, Results, how, scale_of
from benchmarks.regret.figures import curve_of
from benchmarks.regret.job import GROUP_SIZE, HELD_OUT_QUESTIONS, Job, Result
from benchmarks.regret.questions import KINDS, REWARDED
from benchmarks.regret.real import RealScale
from benchmarks.regret.real_figures import Seeds

RANKS = (0, 1, 8)
STEPS, BATCH_SIZE = 10, 8
# Half decades; at the highest, all methods do worse than at the one before.
FULL_RATES, LORA_RATES = (1e-5, 3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3, 3e-3)
# The first is the one that the rates are chosen by.
SEEDS = (0, 1, 2)
# Questions of each kind that the base is measured on.
MEASURED = 24
# A difference in the share of right answers that counts, and what has to be learned to tell.
BEHIND, LEARNED = 0.1, 0.2
CLAIM = "rank 1 learns as well as full fine-tuning"
TEXT = """\
The task was chosen by how often the base answers rightly: {measured} questions of each kind,
{group} answers to each at temperature 1, uncut.

| kind | a question | right | right answers | questions answered both ways | what the base says |
|---|---|---|---|---|---|
{rows}
Rewarded is `{rewarded}`, with 1 where the answer's line is the word and nothing else. A run is
{steps} steps of {batch} questions with {group} answers each, in two updates of the loss of
`megalora.losses`: policy gradient with importance sampling, rewards less their group's mean. Each
method has the best of four rates by the share of right answers, in brackets, over the run of the
first seed: {rates}.
Seeds differ in the questions, the answers and the adapters' start values. Held out are
{held_out} questions, {group} answers each, of which none was trained on. Answers are sampled by
`megalora.rollouts.megatron` from the model in training. The largest difference of a token's log
probability from the learner's was {gap:.2g} nats in {precision}; the ratio in the loss corrects it.

There is little to learn: which of the words before it to copy, and to end the line. That rank 1
does for more is not shown by it.
"""


def rl_job(rank: int, lr: float, seed: int, scale: RealScale) -> Job:
    """Return a run."""
    like = scale.job(rank, lr, seed)
    return replace(like, steps=STEPS, batch_size=BATCH_SIZE, seq_length=None, is_rl=True)


def measured_jobs(scale: RealScale) -> list[Job]:
    """Return what measures how often the base answers each kind of question rightly."""
    like = replace(rl_job(0, 0.0, 0, scale), steps=0, batch_size=MEASURED)
    return [replace(like, questions=kind) for kind in KINDS]


def rate_jobs(scale: RealScale) -> list[Job]:
    """Return the runs of one seed that each method's rate is chosen by."""
    return [
        rl_job(rank, lora if rank else full, SEEDS[0], scale)
        for full, lora in zip(FULL_RATES, LORA_RATES, strict=True)
        for rank in RANKS
    ]


def best_jobs(results: Results, scale: RealScale) -> list[Job]:
    """Return the runs of all seeds, each method at the rate that answered best over its run."""
    best: dict[int, Job] = {}
    for job in rate_jobs(scale):
        if job.rank not in best or during(results[job]) > during(results[best[job.rank]]):
            best[job.rank] = job
    return [replace(job, seed=seed) for seed in SEEDS for job in best.values()]


def during(result: Result) -> float:
    """Return the share of right answers of a whole run: high where it is soon and stays high."""
    return mean(result.curve)


def stages(results: Results, scale: RealScale) -> Iterator[list[Job]]:
    """Yield what has to run next; `results` must have it before the next stage is asked for."""
    yield [*rate_jobs(scale), *measured_jobs(scale)]
    yield best_jobs(results, scale)


def figure(stored: Callable[[Sequence[Job]], Results], scale: RealScale) -> Figure | None:
    """Return figure 6 of the seeds that all methods have; None where not all rates have run.

    stored: gives the results of those jobs that have run.
    """
    first = [*measured_jobs(scale), *rate_jobs(scale)]
    results = stored(first)
    if any(job not in results for job in first):
        return None
    results |= stored(best_jobs(results, scale))
    return rl_figure(results, scale)


def rl_figure(results: Results, scale: RealScale) -> Figure:
    """Figure 6: in reinforcement learning rank 1 does what full fine-tuning does."""
    wanted = best_jobs(results, scale)
    whole = [s for s in SEEDS if all(job in results for job in wanted if job.seed == s)]
    jobs = [job for job in wanted if job.seed in whole]
    runs = {
        rank: [
            results[job] for seed in whole for job in jobs if (job.rank, job.seed) == (rank, seed)
        ]
        for rank in RANKS
    }
    at_end = {rank: Seeds(tuple(run.final for run in of)) for rank, of in runs.items()}
    at_all = {rank: Seeds(tuple(during(run) for run in of)) for rank, of in runs.items()}
    before = mean(run.before or 0.0 for of in runs.values() for run in of)
    best = {job.rank: job for job in jobs}
    return Figure(
        name="figure-6",
        title=f"Reinforcement learning: {REWARDED.replace('_', ' ')}",
        x_label="step",
        y_label="share of right answers",
        findings=[
            Finding(
                article=f"{CLAIM} (judged here by held-out questions after {STEPS} steps: behind "
                f"by less than {BEHIND})",
                here=f"{_listed(at_end)}; {before:.2f} before",
                holds=_as_well(at_end, before),
            ),
            Finding(
                article=f"{CLAIM} (judged here by all answers of a run, the same limit)",
                here=_listed(at_all),
                holds=_as_well(at_all, before),
            ),
        ],
        curves=[curve_of(how(best[rank]), of, 1) for rank, of in runs.items()],
        scale=f"{scale_of(jobs)}; rates by {len(rate_jobs(scale))} runs",
        text=_text(results, jobs, scale),
        numbers={
            "held_out": {rank: seeds.values for rank, seeds in at_end.items()},
            "before": before,
            "rates": {rank: job.lr for rank, job in best.items()},
            "by_rate": {
                f"{how(job)}, {job.lr:g}": {"during": during(run), "held_out": run.final}
                for job in rate_jobs(scale)
                for run in [results[job]]
            },
            "trainable": {rank: of[0].trainable for rank, of in runs.items()},
        },
    )


def _as_well(share: dict[int, Seeds], before: float) -> bool | None:
    """Judge rank 1 by full fine-tuning; where that has not learned, equality says nothing."""
    if share[0].mean - before < LEARNED:
        return None
    pairs = zip(share[0].values, share[1].values, strict=True)
    return Seeds(tuple(full - one for full, one in pairs)).within(-math.inf, BEHIND)


def _listed(share: dict[int, Seeds]) -> str:
    return ", ".join(
        f"{f'rank {rank}' if rank else 'full fine-tuning'} {of.said('.2f')}"
        for rank, of in share.items()
    )


def _text(results: Results, jobs: Sequence[Job], scale: RealScale) -> str:
    rates = {rank: [job for job in rate_jobs(scale) if job.rank == rank] for rank in RANKS}
    chosen = {job.rank: job.lr for job in jobs}
    return TEXT.format(
        measured=MEASURED,
        group=GROUP_SIZE,
        rows="".join(_row(job, results[job]) for job in measured_jobs(scale)),
        rewarded=REWARDED,
        steps=STEPS,
        batch=BATCH_SIZE,
        held_out=HELD_OUT_QUESTIONS,
        rates="; ".join(
            f"{how(of[0])} {chosen[rank]:g} of "
            + ", ".join(f"{job.lr:g} ({during(results[job]):.2f})" for job in of)
            for rank, of in rates.items()
        ),
        gap=max(results[job].gap or 0.0 for job in jobs),
        precision=scale.precision,
    )


def _row(job: Job, result: Result) -> str:
    """Return a line of the table of base rates."""
    assert result.examples
    question, right, *said = result.examples[0]
    mixed = mean(0 < share < 1 for share in result.curve)
    shown = ", ".join(_code(text) for text in dict.fromkeys(said[:3]))
    return (
        f"| `{job.questions}` | {_code(question)} | {_code(right)} | {result.final:.1%} | "
        f"{mixed:.0%} | {shown} |\n"
    )


def _code(text: str) -> str:
    """Return a text as code in a cell of a table, ends of lines as \\n."""
    shown = text.replace("\n", "\\n").replace("|", "/").replace("`", "'")
    return f"`{shown}`" if shown.strip() else "(nothing)"
