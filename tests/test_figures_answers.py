"""Reinforcement learning of a pretrained model, here a tiny one of Hugging Face's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.regret import real_rl
from benchmarks.regret.experiments import Results
from benchmarks.regret.job import Job, Result
from benchmarks.regret.questions import KINDS, Question, draw, last_word
from benchmarks.regret.real import RealScale
from tests.support import forked

SCALE = RealScale(model="tiny")
TOKENS = 320


class Letters(Question):
    """A question whose answer is right where it begins with a letter."""

    def reward(self, completion: str) -> float:
        """Return 1 where a completion begins with a letter."""
        return float(completion[:1].isalpha())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what runs on a tiny model give, all of one process."""
    from tests.support.chat_templates import hugging_face_tokenizer
    from tests.support.hf_models import hf_model

    directory = tmp_path_factory.mktemp("answers") / "tiny"
    hf_model("llama", vocab_size=TOKENS).save_pretrained(directory)
    hugging_face_tokenizer("").save_pretrained(directory)
    return forked.call(run_all, directory)


def run_all(directory: Path) -> dict[str, Any]:
    """Let the model answer and learn, and look at its answers in two ways."""
    from benchmarks.regret import answers, pretrained
    from benchmarks.regret.model import Trainer, start_megatron

    start_megatron()
    KINDS["letters"] = lambda rng: Letters(f"{rng.randrange(1000, 10000)}:", "")
    trainer = Trainer(pretrained.build(directory, "fp32"), None, 1e-3, adam_eps=1e-8)
    answering, learner = answers.Answering(trainer.model, directory), answers.Learner(trainer)
    groups = answering.groups(draw(KINDS["letters"], 6, 0), 1, max_tokens=3)
    rows = answers.Rows.of(groups)
    each = [(group.prompt, answer.tokens) for group in groups for answer in group.answers]

    @torch.no_grad()
    def packed() -> torch.Tensor:
        return rows.logprobs(trainer.model)[rows.answered]

    with torch.no_grad():
        logits = trainer.model(rows.tokens, rows.positions.expand_as(rows.tokens), rows.hidden)
    misplaced = logits[:, rows.predictors].log_softmax(-1).gather(-1, rows.targets[:, :, None])
    made = {"packed": packed(), "misplaced": misplaced[..., 0][rows.answered]}
    made |= {"alone": torch.cat([alone(trainer, *one) for one in each])}
    made |= {"sizes": {len(tokens) for _, tokens in each}}
    alike = [answers.Group(prompt=g.prompt, answers=g.answers, rewards=[1.0] * 8) for g in groups]
    learner.learn(alike)
    made["after equal rewards"] = packed()
    learner.learn(groups)
    right = torch.tensor([reward for group in groups for reward in group.rewards]) == 1
    firsts = torch.tensor([len(tokens) for _, tokens in each]).cumsum(0) - torch.tensor(
        [len(tokens) for _, tokens in each]
    )
    made |= {"after": packed()[firsts], "before": made["packed"][firsts], "right": right}
    common: dict[str, Any] = {"seed": 0, "base": "pretrained", "is_rl": True, "precision": "fp32"}
    common |= {"questions": "letters", "batch_size": 8}
    jobs = {
        "measured": Job(lr=0.0, steps=0, **common),
        "full": Job(lr=1e-2, steps=16, **common),
        "rank 1": Job(lr=3e-2, rank=1, steps=16, **common),
    }
    return made | {how: answers.run(job, directory) for how, job in jobs.items()}


@torch.no_grad()
def alone(trainer: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log probabilities of an answer that is the only one behind its prompt."""
    logits = trainer.logits(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def test_answers_in_one_row_are_as_likely_as_each_alone(found: dict[str, Any]) -> None:
    assert len(found["sizes"]) > 1, "answers of one length: vacuous"
    torch.testing.assert_close(found["packed"], found["alone"], rtol=0, atol=1e-4)
    assert (found["misplaced"] - found["alone"]).abs().max() > 1e-2, "places do not matter: vacuous"


def test_a_group_of_equal_rewards_teaches_nothing(found: dict[str, Any]) -> None:
    assert torch.equal(found["after equal rewards"], found["packed"])


def test_right_answers_become_likelier_and_wrong_ones_do_not(found: dict[str, Any]) -> None:
    gain = found["after"] - found["before"]
    assert 0 < found["right"].sum() < len(gain)
    assert gain[found["right"]].mean() > 0
    assert gain[found["right"]].mean() > gain[~found["right"]].mean() + 1e-3


@pytest.mark.parametrize("how", ["full", "rank 1"])
def test_a_model_learns_what_is_rewarded(found: dict[str, Any], how: str) -> None:
    result = found[how]
    assert result.before < 0.5
    assert result.final > result.before + 0.2, result.curve
    assert 0 < result.gap < 1e-3, "in fp32 the sampler's numbers are the learner's"


def test_a_base_is_measured_question_by_question(found: dict[str, Any]) -> None:
    measured = found["measured"]
    assert len(measured.curve) == 8
    assert measured.final == pytest.approx(sum(measured.curve) / 8)
    assert 0 < measured.final < 0.5
    assert all(len(example) == 2 + 8 for example in measured.examples)


def test_an_answer_is_its_first_line_and_nothing_else() -> None:
    question = Question("Last word of egg key:", "key")
    assert [question.reward(said) for said in (" key\n", " key\nand more", "key")] == [1, 1, 1]
    assert not any(question.reward(said) for said in ("\nkey", " keys\n", " key of\n", " egg\n"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_questions_differ_and_none_is_one_of_those_held_out(kind: Callable[..., Any]) -> None:
    held_out = draw(kind, 8, "held out")
    asked = draw(kind, 24, 0, without=held_out)
    assert len({*held_out, *asked}) == 32
    assert asked == draw(kind, 24, 0, without=held_out)
    assert asked != draw(kind, 24, 1, without=held_out)
    assert all(question.reward(f" {question.answer}\n") for question in asked)


def test_the_last_word_is_the_right_one() -> None:
    assert all(q.prompt.endswith(f" {q.answer}:") for q in draw(last_word, 8, 0))


def made_up(jobs: Sequence[Job], end: Callable[[Job], float]) -> Results:
    """Return results of runs that go from 0.1 to `end` at once."""
    examples = [["1 + 1 =", "2", " 2\n", " |\n", ""]]
    return {
        job: Result(
            curve=[0.1, *[end(job)] * 9] if job.steps else [0.5, 0.0],
            final=end(job),
            trainable=100,
            before=0.1,
            gap=0.2,
            examples=None if job.steps else examples,
        )
        for job in jobs
    }


def figure_of(end: Callable[[Job], float], seeds: int = 3) -> Any:
    """Return the figure of runs that end there, of which some seeds have run."""

    def stored(jobs: Sequence[Job]) -> Results:
        return made_up([job for job in jobs if job.seed < seeds], end)

    return real_rl.figure(stored, SCALE)


def at_middle(full: float, one: float, spread: float = 0.0) -> Callable[[Job], float]:
    """Return where runs end: at the middle rates there, a little of it by the seed."""

    def end(job: Job) -> float:
        value = full if job.rank == 0 else one
        return (value if job.lr in (3e-5, 3e-4) else value / 2) + spread * (job.seed - 1)

    return end


@pytest.mark.parametrize(
    ("full", "one", "spread", "verdict"),
    [
        (0.9, 0.88, 0.0, True),
        (0.9, 0.6, 0.0, False),
        (0.25, 0.25, 0.0, None),
    ],
)
def test_equality_needs_full_fine_tuning_to_have_learned(
    full: float, one: float, spread: float, verdict: bool | None
) -> None:
    figure = figure_of(at_middle(full, one, spread))
    assert [finding.holds for finding in figure.findings] == [verdict, verdict]
    assert figure.numbers["rates"] == {0: 3e-5, 1: 3e-4, 8: 3e-4}


def test_seeds_that_disagree_or_are_one_decide_nothing() -> None:
    def torn(job: Job) -> float:
        return at_middle(0.9, 0.85)(job) - (0.3 if (job.rank, job.seed) == (1, 2) else 0.0)

    assert [f.holds for f in figure_of(torn).findings] == [None, None]
    assert [f.holds for f in figure_of(at_middle(0.9, 0.6), seeds=1).findings] == [None, None]


def test_a_figure_waits_for_the_rates_and_its_text_has_the_base_rates() -> None:
    assert real_rl.figure(lambda jobs: made_up(jobs[:-1], lambda job: 0.5), SCALE) is None
    text = figure_of(at_middle(0.9, 0.9)).text
    # The rate of what only answers is none of the runs'.
    row = "| `sum_of_two` | `1 + 1 =` | `2` | 45.0% | 50% | ` 2\\n`, ` /\\n`, (nothing) |\n"
    assert row in text, text
    assert "full fine-tuning 3e-05 of 1e-05" in text
