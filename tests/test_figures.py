"""The experiments of the article at toy size: the runs are real, the verdicts can fail."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.regret import experiments, figures, report
from benchmarks.regret.experiments import Figure, Results, Scale
from benchmarks.regret.job import Base, Job, Result
from benchmarks.regret.workers import run_all

SCALE = Scale(sweep_rates=(1e-3, 1e-2, 1e-1), sweep_steps=32, long_steps=50, rl_steps=50)


def made_up(
    jobs: Sequence[Job], value: Callable[[Job], float], start: float | None = None
) -> Results:
    """Return results whose end is `value`, and whose curves go from `start` straight to it."""
    results = {}
    for job in jobs:
        end = value(job)
        first = end if start is None else start
        curve = [first + (end - first) * step / job.steps for step in range(job.steps)]
        results[job] = Result(curve=curve, final=end, trainable=1000)
    return results


def swept(best: Callable[[int], float]) -> Results:
    """Return a sweep in which each rank has its least loss at the rate `best` names."""
    return made_up(
        experiments.sweep_jobs(SCALE), lambda job: 1.0 if job.lr == best(job.rank) else 2.0
    )


def holds(figure: Figure) -> list[bool | None]:
    """Return what each finding says."""
    return [finding.holds for finding in figure.findings]


def lora_ten_times(rank: int) -> float:
    return 1e-2 if rank else 1e-3


def test_rates_are_reproduced_where_all_ranks_agree_at_ten_times_full() -> None:
    figure = figures.rate_figure(swept(lora_ten_times), SCALE)
    assert holds(figure) == [True, True]
    assert figure.numbers["ratio"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (lambda rank: 1e-2, [True, False]),
        (lambda rank: 1e-1 if rank == 64 else lora_ten_times(rank), [False, False]),
    ],
)
def test_rates_are_not_where_full_has_the_same_or_ranks_differ(
    best: Callable[[int], float], expected: list[bool]
) -> None:
    assert holds(figures.rate_figure(swept(best), SCALE)) == expected


LOSSES = {1: 1.8, 4: 1.5, 16: 1.2, 64: 1.0, 0: 1.0}


@pytest.mark.parametrize(
    ("change", "expected"), [({}, True), ({1: 1.5}, False), ({64: 1.1, 16: 1.3}, False)]
)
def test_capacity_needs_every_rank_apart_and_the_largest_at_full(
    change: dict[int, float], expected: bool
) -> None:
    results = swept(lora_ten_times)
    losses = LOSSES | change
    results |= made_up(experiments.long_jobs(results, SCALE), lambda job: losses[job.rank])
    assert holds(figures.capacity_figure(results, SCALE)) == [expected]


@pytest.mark.parametrize(("penalty", "expected"), [(0.3, True), (0.0, False)])
def test_batches_need_a_gap_that_grows(penalty: float, expected: bool) -> None:
    results = swept(lora_ten_times)
    jobs = experiments.batch_jobs(results, SCALE)
    results |= made_up(jobs, lambda job: 1 + penalty * (job.rank > 0) * job.batch_size / 128)
    assert holds(figures.batch_figure(results, SCALE)) == [expected]


@pytest.mark.parametrize(
    ("attention", "both", "expected"),
    [(1.2, 1.0, [True, True]), (1.0, 1.0, [False, True]), (1.2, 0.8, [True, False])],
)
@pytest.mark.parametrize("base", ["dense", "moe"])
def test_placement_needs_attention_to_be_worse_and_both_to_be_no_better(
    base: Base, attention: float, both: float, expected: list[bool]
) -> None:
    results = swept(lora_ten_times)
    jobs = experiments.placement_jobs(base, results, SCALE)
    losses = {"attn": attention, "mlp": 1.0, "all": both}
    results |= made_up(jobs, lambda job: losses[job.targets[0]])
    assert holds(figures.placement_figure(base, results, SCALE)) == expected


@pytest.mark.parametrize(
    ("full", "rank_1", "rank_1_facts", "expected"),
    [
        (0.9, 0.9, 0.6, [True, True]),
        (0.9, 0.9, 0.9, [True, False]),
        (0.9, 0.6, 0.6, [False, None]),
        (0.25, 0.25, 0.2, [None, None]),
    ],
)
def test_reinforcement_says_nothing_where_nothing_was_learned_or_capacity_is_not_the_reason(
    full: float, rank_1: float, rank_1_facts: float, expected: list[bool | None]
) -> None:
    def right(jobs: list[Job], rank_1: float) -> Results:
        share = {0: full, 1: rank_1, 8: full}
        return made_up(jobs, lambda job: share[job.rank], start=0.2)

    results = right(experiments.rl_sweep_jobs(SCALE), rank_1)
    results |= right(experiments.rl_jobs(results, SCALE), rank_1)
    results |= right(experiments.rl_fact_jobs(SCALE), rank_1_facts)
    assert holds(figures.rl_figure(results, SCALE)) == expected


def test_the_best_rate_is_read_between_the_rates_of_the_grid() -> None:
    def bowl(job: Job) -> float:
        return 1 + math.log(job.lr / 2e-2) ** 2

    jobs = experiments.sweep_jobs(SCALE)
    results = made_up(jobs, bowl)
    assert experiments.best_rate(results, jobs[0], SCALE) == 1e-2
    assert experiments.interpolated_rate(results, jobs[0], SCALE) == pytest.approx(2e-2)


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    """Return figure 9 from real runs on a base that has hardly been trained."""
    scale = Scale(pretrain_steps=40, early_steps=12, sweep_rates=(3e-3,))
    rates = made_up(experiments.sweep_jobs(scale), lambda job: 1.0)
    jobs = [job for job in experiments.early_jobs(rates, scale) if job.rank in (1, 16, 64)]
    # Forked from a server that has imported Megatron and done nothing with it.
    real = run_all(jobs, tmp_path_factory.mktemp("regret"), 1, start_method="forkserver")
    unused = [job for job in experiments.early_jobs(rates, scale) if job.rank == 4]
    return figures.early_figure(rates | real | made_up(unused, lambda job: 1.0), scale)


def test_the_first_steps_do_not_depend_on_the_rank(early: Figure) -> None:
    slow, fast = early.findings
    assert slow.holds, slow.here
    assert fast.holds, fast.here
    distance = early.numbers["distance"]["0.003"]
    assert distance[1] > distance[16] > 0, "rank 1 must be seen"


def test_the_first_steps_do_lower_the_loss(early: Figure) -> None:
    middle = next(curve for curve in early.curves if curve.label == "rank 16, rate 0.003").seeds
    assert all(seed[-1] < 0.98 * seed[0] for seed in middle), "nothing was learned: vacuous"


def test_the_page_shows_every_figure_with_its_verdict(tmp_path: Path, early: Figure) -> None:
    report.save([early], tmp_path / "figures", report.About(title="The toy", text="Small.\n"))
    report.write_page(tmp_path / "figures", tmp_path / "regret.md")
    page = (tmp_path / "regret.md").read_text()
    assert page.count("**reproduced**") == 3, "two rates, and one line that sums them up"
    assert "(figures/figure-9.png)" in page
    assert (tmp_path / "figures" / "figure-9.png").stat().st_size > 10_000
    assert (tmp_path / "figures" / "figure-9.json").is_file()
