"""The article's experiments on a pretrained model: its runs, its verdicts and its page."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from benchmarks.regret import real, real_figures, real_page, report, workers
from benchmarks.regret.experiments import Figure, Results
from benchmarks.regret.job import Job, Norms, Result
from benchmarks.regret.real import RANKS, RealScale
from tests.support.waiting import wait_until

SCALE = RealScale(model="tiny", steps=8)
Value = Callable[[Job], float]


def made_up(jobs: Sequence[Job], value: Value, b_above_a: float = 0.9) -> Results:
    """Return results that end at `value`, on curves that go there from 3."""
    norms = Norms(a=1.0, b=2 * b_above_a, update=1.0, relative=0.1, b_above_a=b_above_a, modules=7)
    return {
        job: Result(
            curve=[3 + (value(job) - 3) * (step + 1) / job.steps for step in range(job.steps)],
            final=value(job),
            trainable=1000,
            cpu_seconds=2.0 if job.precision == "fp32" else 1.0,
            norms=norms if job.rank else None,
        )
        for job in jobs
    }


def whole(
    jobs_of: real_page.JobsOf, value: Value, b_above_a: float = 0.9, known: Results | None = None
) -> Results:
    """Return results of all that is asked for beside what is known, grids grown."""
    results = dict(known or {})
    while missing := [j for j in jobs_of(results, SCALE) if j not in results]:
        results |= made_up(missing, value, b_above_a)
    return results


def bowl(best: Value, noise: float = 1e-3) -> Value:
    """Return losses with the least at the rate `best` names, a bowl around it."""
    return lambda job: 2 + 0.01 * math.log(job.lr / best(job)) ** 2 + noise * job.seed


def swept(best: Value, b_above_a: float = 0.9) -> Results:
    """Return a whole sweep of such losses."""
    return whole(real.sweep_jobs, bowl(best), b_above_a)


def ten_times(job: Job) -> float:
    return 2e-3 if job.rank else 2e-4


def holds(figure: Figure) -> list[bool | None]:
    """Return what each finding says."""
    return [finding.holds for finding in figure.findings]


def test_a_grid_grows_until_its_best_rate_is_none_of_its_ends() -> None:
    results = swept(lambda job: 1e-5 if job.rank == 0 else 3e-2)
    assert real.rates(SCALE.method(0), results, SCALE) == (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
    assert real.rates(SCALE.method(16), results, SCALE) == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    assert real.best_rate(SCALE.method(0), results, SCALE) == 1e-5


def test_a_grid_grows_where_one_seed_asks_for_it() -> None:
    """Its best rate is read between the rates of the grid, as that of the others is."""
    results = swept(lambda job: (8e-4, 3e-3)[job.seed] if job.rank else 2e-4)
    assert real.rates(SCALE.method(16), results, SCALE) == (3e-4, 1e-3, 3e-3, 1e-2)
    # The mean's own is no end of the first three.
    assert real.best_rate(SCALE.method(16), results, SCALE) == 1e-3


def test_a_grid_ends_where_runs_lose_their_numbers() -> None:
    jobs = real.sweep_jobs({}, SCALE)
    results = made_up(jobs, lambda job: math.nan if job.lr >= 3e-3 else 2 - job.lr)
    # What the sweep asks for beside these is worse.
    results = whole(real.sweep_jobs, lambda job: 2.5, known=results)
    assert real.best_rate(SCALE.method(16), results, SCALE) == 1e-3


def test_the_first_seed_runs_whole_before_the_second_and_grids_grow_last() -> None:
    results: Results = {}
    order = []
    for jobs in real_page.stages(["2"], results, SCALE):
        missing = [job for job in jobs if job not in results]
        order += [job.seed for job in missing]
        results |= made_up(missing, lambda job: 2 - 100 * job.lr * (job.rank == 0))
    assert order[:12] == [0] * 12
    assert set(order[12:]) == {0, 1}
    assert real.rates(SCALE.method(0), results, SCALE)[-1] == real.LADDER[-1]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (ten_times, [True, True]),
        (lambda job: 2e-3, [True, False]),
        (lambda job: ten_times(job) * 4 ** (job.rank == 256), [False, True]),
        (lambda job: ten_times(job) * (8 if job.rank and job.seed else 1), [True, None]),
    ],
)
def test_rates_have_a_verdict_only_where_the_seeds_agree(
    best: Value, expected: list[bool | None]
) -> None:
    assert holds(real_figures.rate_figure(swept(best), SCALE)) == expected


def test_what_diverged_is_beyond_the_picture() -> None:
    """It would leave no room for the differences between the others."""
    far = swept(lambda job: ten_times(job) * (1 + 2 * (job.rank == 16)))
    results = {
        job: replace(run, final=math.nan if job.lr == 1e-2 else run.final)
        for job, run in far.items()
    }
    figure = real_figures.rate_figure(results, SCALE)
    least = min(run.final for run in far.values())
    assert figure.y_limits == pytest.approx((0.99 * least, 1.15 * least))


def test_seeds_that_differ_by_less_than_the_limit_decide() -> None:
    """A distance has a limit above alone: twice its error may well be more than itself."""
    results = swept(lambda job: ten_times(job) * (1.2 if (job.rank, job.seed) == (256, 1) else 1))
    assert holds(real_figures.rate_figure(results, SCALE)) == [True, True]


def test_one_seed_decides_nothing() -> None:
    results, one = swept(ten_times), replace(SCALE, seeds=(0,))
    figures = [real_figures.rate_figure, real_figures.early_figure, real_figures.norm_figure]
    assert {verdict for of in figures for verdict in holds(of(results, one))} == {None}


def test_the_best_rate_is_read_between_the_rates_of_the_grid() -> None:
    figure = real_figures.rate_figure(swept(ten_times), SCALE)
    assert figure.numbers["best_rates"]["rank 16"] == pytest.approx((2e-3, 2e-3))
    assert figure.numbers["ratio"] == pytest.approx([10, 10])
    assert len(figure.curves) == 1 + len(RANKS)


@pytest.mark.parametrize(
    ("penalty", "noise", "expected"), [(0.1, 0.01, True), (0, 0.001, False), (0.03, 0.1, None)]
)
def test_batches_need_a_gap_that_grows_beyond_the_seeds(
    penalty: float, noise: float, expected: bool | None
) -> None:
    def loss(job: Job) -> float:
        behind = (penalty + noise * job.seed) * job.batch_size / 32
        return bowl(ten_times)(job) + behind * (job.rank > 0)

    results = whole(real.batch_jobs, loss)
    assert holds(real_figures.batch_figure(results, SCALE)) == [expected]


def test_a_batch_size_has_a_grid_of_its_own() -> None:
    """Half as many steps want twice the rate: a grid that ended below would hide what LoRA can."""
    results = whole(real.batch_jobs, bowl(lambda job: ten_times(job) * job.batch_size / 2))
    assert real.best_rate(real.batch_method(16, 32, SCALE), results, SCALE) == 3e-2
    assert real.rates(real.batch_method(16, 4, SCALE), results, SCALE)[-1] == 1e-2
    figure = real_figures.batch_figure(results, SCALE)
    assert holds(figure) == [False]
    assert "rank 16 0.003 in batches of 4, 0.01 in batches of 8, 0.03 in batches" in figure.text


@pytest.mark.parametrize(
    ("attention", "both", "noise", "expected"),
    [
        (2.2, 2.0, 0.01, [True, True]),
        (1.9, 1.9, 0.01, [False, False]),
        (2.1, 2.0, 0.5, [None, True]),
    ],
)
def test_placement_is_judged_beyond_the_seeds(
    attention: float, both: float, noise: float, expected: list[bool | None]
) -> None:
    losses = {("attn",): attention, ("mlp",): 2.0, ("attn", "mlp"): both}

    def loss(job: Job) -> float:
        seeds = noise * job.seed * (job.targets == ("attn",))
        return losses[job.targets] - 2 + bowl(ten_times)(job) + seeds

    results = whole(real.placement_jobs, loss)
    assert holds(real_figures.placement_figure(results, SCALE)) == expected


@pytest.mark.parametrize(
    ("of_16", "expected"), [(lambda job: 0.001, True), (lambda job: 0.2, False)]
)
def test_early_curves_are_those_of_the_sweep(of_16: Value, expected: bool) -> None:
    jobs = real.sweep_jobs(swept(ten_times), SCALE)
    results = swept(ten_times)
    results |= made_up(jobs, lambda job: results[job].final * (1 + of_16(job) * (job.rank == 16)))
    figure = real_figures.early_figure(results, SCALE)
    assert holds(figure) == [expected, expected]
    assert [c.label for c in figure.curves][:2] == ["rank 1, rate 0.0003", "rank 16, rate 0.0003"]


@pytest.mark.parametrize(("share", "expected"), [(0.9, True), (0.2, False)])
def test_b_above_a_is_judged_by_most_modules(share: float, expected: bool) -> None:
    assert holds(real_figures.norm_figure(swept(ten_times, share), SCALE)) == [expected]


@pytest.mark.parametrize(("apart", "expected"), [(0.002, True), (0.1, False)])
def test_precisions_are_compared_on_the_same_runs(apart: float, expected: bool) -> None:
    results = swept(ten_times)
    plain = [job for job, _ in real.precision_pairs(SCALE)]
    results |= made_up(
        plain, lambda job: results[replace(job, precision="bf16")].final * (1 + apart)
    )
    figure = real_figures.precision_figure(results, SCALE)
    assert holds(figure) == [expected]
    assert "in fp32 2.00 x" in figure.findings[0].here


def stored(results: Results, work: Path) -> None:
    """Leave results as workers do."""
    (work / "runs").mkdir(parents=True)
    for job, result in results.items():
        (work / "runs" / f"{job.key}.json").write_text(result.to_json())


def test_the_page_has_complete_figures_beside_those_of_the_other_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs, work = tmp_path / "docs", tmp_path / "work"
    claim = "the best rate of LoRA is about 10 times that of full fine-tuning"
    toy = {"name": "figure-2", "title": "A toy's", "scale": "", "verdicts": ["not reproduced"]}
    toy["findings"] = [{"article": claim, "here": "1.5 times"}]
    (docs / "regret").mkdir(parents=True)
    (docs / "regret" / "figure-2.json").write_text(json.dumps(toy))
    (docs / "regret" / report.ABOUT).write_text('{"title": "The toy", "text": "Small.\\n"}')
    stored(swept(ten_times), work)
    real_page.write(["2", "4"], SCALE, work, docs)
    assert "4: left out" in capsys.readouterr().out
    page = (docs / "regret.md").read_text()
    assert f"| 2 | {claim} | **not reproduced** | **reproduced** |" in page
    assert page.index("## The toy\n\nSmall.") < page.index("## tiny")
    assert "(regret/tiny/figure-2.png)" in page
    assert "(regret/figure-2.png)" in page
    assert json.loads((docs / "regret/tiny/figure-2.json").read_text())["verdicts"]


def test_the_page_names_the_command_that_ran_more_seeds() -> None:
    assert "`make figures MODEL=tiny` ran" in real_page.about(SCALE).text
    more = real_page.about(replace(SCALE, seeds=(0, 1, 2))).text
    assert '`make figures MODEL=tiny FIGURES="--seeds 3"` ran' in " ".join(more.split())
    assert "as many of these 3 seeds" in " ".join(more.split())


def test_a_run_that_lost_its_numbers_leaves_json_that_others_can_read(tmp_path: Path) -> None:
    figure = real_figures.rate_figure(swept(ten_times), SCALE)
    curve = replace(figure.curves[0], seeds=[[math.nan] * len(figure.curves[0].x)])
    broken = replace(figure, curves=[curve, *figure.curves[1:]])
    report.save([broken], tmp_path, report.About(title="", text=""))
    text = (tmp_path / "figure-2.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["curves"][0]["seeds"][0][0] is None


def killed(folder: Path, job: Job, hf_model: Path | None) -> Job:
    """End as a worker does that the kernel kills for its memory."""
    os._exit(137)


def refused(folder: Path, job: Job, hf_model: Path | None) -> Job:
    """Leave a file, and fail."""
    (folder / str(job.seed)).touch()
    raise ValueError("no such model")


@pytest.mark.parametrize(
    ("run", "error"), [(killed, BrokenProcessPool), (refused, ValueError)], ids=["killed", "failed"]
)
def test_a_worker_that_ends_badly_ends_the_run(
    run: Callable[..., Job], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that waits for a killed worker waits for ever; one that goes on hides the failure."""
    monkeypatch.setattr(workers, "_run", run)
    monkeypatch.setattr(workers, "_start_worker", abs)
    jobs = [Job(lr=1e-3, seed=seed, base="pretrained") for seed in range(20)]
    with pytest.raises(error):
        workers.run_all(jobs, tmp_path, 1, "fork")
    assert len(list(tmp_path.iterdir())) < len(jobs)


def start_one(pid: Path) -> None:
    """Start a worker that would never end, and wait with it."""
    get_context("fork").Process(target=one, args=(pid,)).start()
    time.sleep(60)


def one(pid: Path) -> None:
    """Say who this is, and wait for the parent's end alone."""
    pid.write_text(str(os.getpid()))
    workers.end_with_parent()


def test_a_worker_ends_with_its_killed_parent(tmp_path: Path) -> None:
    """Else it computes, and waits, beside the run that goes on."""
    parent = get_context("fork").Process(target=start_one, args=(tmp_path / "pid",))
    parent.start()
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.join()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_toy_runs_keep_their_names() -> None:
    """What is on disk from before a pretrained base had fields of its own is found again."""
    assert Job(lr=1e-3, seed=0).key == "57d0a4692be60f18"
