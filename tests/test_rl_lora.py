"""The reinforcement learning example learns, on any layout, and goes on where it stopped."""

import json
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import hf_models
from tests.support.chat_templates import hugging_face_tokenizer
from tests.support.examples import EXAMPLES
from tests.support.forked import ROOT, Ranks, call
from tests.support.stand_in_servers import Sampler as Served
from tests.support.stand_in_servers import serving, sglang_routes, vllm_routes
from tests.support.tiny import back_to, flags, same_tensors, train

sys.path.insert(0, str(ROOT / "benchmarks"))
import rl_curve

MODEL = shlex.split("""
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 16 --normalization RMSNorm
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--seq-length 16 --max-position-embeddings 16 --init-method-std 0.1
--attention-dropout 0 --hidden-dropout 0
""")
LAYERS = shlex.split("""
--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion
""")
TRAINING = shlex.split("""
--cpu --byte-tokenizer --lora-rank 8 --lr 1e-2 --lr-decay-style constant --weight-decay 0
--micro-batch-size 16 --global-batch-size 64 --group-size 8 --num-updates 2 --max-tokens 6
--make-vocab-size-divisible-by 16
""")
# Of the 262 tokens, 26 are letters that the reward wants, and 6 of them are an answer.
BY_CHANCE = 26 / 262
REWARD = """
def letters(completion, answer, row):
    if row["shift"] == 11:
        raise KeyError("shift")
    return sum(character in answer for character in completion) / 6

def number_of_row(completion, answer):
    return answer
"""
ITERATIONS, SAVED = 12, 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, prompts, and a reward for them."""
    directory = tmp_path_factory.mktemp("data")
    train(
        1,
        directory / "base",
        "--no-save-optim",
        "--vocab-size",
        261,
        model=[*MODEL, *LAYERS],
        iters=1,
    ).succeed()
    rows = [
        {"prompt": f"{a} to {b}:", "answer": "abcdefghijklmnopqrstuvwxyz", "shift": 0}
        for a in range(6)
        for b in range(6)
    ]
    write(directory / "prompts.jsonl", rows)
    (directory / "rewards.py").write_text(REWARD)
    return directory


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def start(
    data: Path,
    logs: Path,
    iterations: int,
    *more: object,
    world_size: int = 1,
    of_rank_1: Sequence[object] = (),
) -> Ranks:
    given = ["--pretrained-checkpoint", data / "base", "--dataset", data / "prompts.jsonl"]
    given += ["--reward", f"{data / 'rewards.py'}:letters", "--train-iters", iterations]
    words: Sequence[object] = [*MODEL, *LAYERS, *TRAINING, *given, *more]
    script, own = EXAMPLES / "rl_lora.py", {1: of_rank_1}
    return Ranks(world_size, words, logs, script=script, by_megalora=False, own_flags=own)


class Run:
    """What a run has logged, but how fast it was, by iteration."""

    def __init__(self, ranks: Ranks) -> None:
        self.text = ranks.text()
        self.iterations = numbers(self.text, r"iteration (\d+)/\d+")
        self.evaluations = numbers(self.text, r"evaluation after (\d+)")
        self.rewards = [found["reward/mean"] for found in self.iterations.values()]


def numbers(text: str, title: str) -> dict[int, dict[str, float]]:
    found = {}
    for line in re.findall(rf"^{title} \| (.*)$", text, re.MULTILINE):
        pairs = (pair.rsplit(": ", 1) for pair in line[1].split(" | "))
        each = {name: float(value) for name, value in pairs if "per-second" not in name}
        found[int(line[0])] = each
    return found


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    logs = tmp_path_factory.mktemp("whole")
    more = ["--save", logs / "saved", "--save-interval", SAVED, "--tensorboard-dir", logs / "board"]
    more += ["--eval-interval", SAVED, "--print-answers", 2, "--lora-log-interval", SAVED]
    return Run(start(data, logs, ITERATIONS, *more).succeed()), logs


def test_answers_become_right(whole: tuple[Run, Path]) -> None:
    run, _ = whole
    assert run.rewards[0] < 2 * BY_CHANCE
    assert sum(run.rewards[-3:]) / 3 > 6 * BY_CHANCE
    assert run.evaluations[0]["reward/mean"] < 2 * BY_CHANCE
    assert run.evaluations[ITERATIONS]["reward/mean"] > 6 * BY_CHANCE


def test_a_log_is_drawn(whole: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = whole
    found = rl_curve.read_log(run.text)
    rewards = [metrics["reward/mean"] for metrics in found["iteration"].values()]
    assert rewards == run.rewards
    assert list(found["evaluation after"]) == list(run.evaluations)
    rl_curve.draw(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_is_the_base_that_training_starts_from(whole: tuple[Run, Path]) -> None:
    distances = [found["kl/base"] for found in whole[0].iterations.values()]
    assert distances[0] == 0.0
    assert distances[-1] > 1.0


def test_the_engine_samples_from_what_is_trained(whole: tuple[Run, Path]) -> None:
    assert max(found["gap/largest"] for found in whole[0].iterations.values()) < 1e-4
    # The second step of an iteration is off policy.
    assert whole[0].iterations[2]["ratio/largest"] > 1.1


def test_answers_are_printed_with_their_rewards(whole: tuple[Run, Path]) -> None:
    shown = re.findall(r"^  \d to \d: -> .* \(reward [\d.]+\)$", whole[0].text, re.MULTILINE)
    assert len(shown) == 2 * (ITERATIONS + len(whole[0].evaluations))


def board(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in names}


def test_what_is_logged_is_in_tensorboard(whole: tuple[Run, Path]) -> None:
    run, logs = whole
    found = call(board, logs / "board")
    for iteration, metrics in run.iterations.items():
        written = {name: found[name][iteration] for name in metrics}
        assert written == pytest.approx(metrics, rel=1e-3, abs=1e-20)
    assert set(found["eval/reward/mean"]) == set(run.evaluations)
    assert min(found["tokens-per-second/sampled"].values()) > 0
    assert list(found["lora/spectral-B/all"]) == list(range(SAVED, ITERATIONS + 1, SAVED))


@pytest.mark.parametrize(
    ("layout", "rows"), [("tp2 sp", 8), ("pp2", 16)], ids=["tensor parallel", "pipeline"]
)
def test_two_ranks_train_as_one(
    data: Path, whole: tuple[Run, Path], tmp_path: Path, layout: str, rows: int
) -> None:
    # The same padding of the vocabulary, and the same prompts left after those held out.
    more = ["--make-vocab-size-divisible-by", rows, "--eval-interval", SAVED]
    ranks = start(data, tmp_path, 3, *flags(layout), *more, world_size=2)
    split = Run(ranks.succeed())
    for iteration, metrics in split.iterations.items():
        expected = whole[0].iterations[iteration]
        for name in ("reward/mean", "reward/std", "answer/tokens", "answer/ended"):
            assert metrics[name] == expected[name]
        for name in ("kl/base", "ratio/mean", "ratio/largest", "grad-norm"):
            assert metrics[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-4)
    assert len(split.iterations) == 3


def test_a_run_goes_on_where_it_stopped(
    data: Path, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    run, logs = whole
    saved = back_to(logs / "saved", tmp_path / "saved", SAVED)
    more = ["--save", saved, "--load", saved, "--save-interval", 2, "--eval-interval", SAVED]
    rest = Run(start(data, tmp_path, ITERATIONS, *more).succeed())
    assert rest.iterations == {n: run.iterations[n] for n in range(SAVED + 1, ITERATIONS + 1)}
    assert rest.evaluations == {ITERATIONS: run.evaluations[ITERATIONS]}
    assert call(same_tensors, logs / "saved", saved, ITERATIONS)


def test_a_kill_at_any_moment_changes_no_reward_and_no_bit(data: Path, tmp_path: Path) -> None:
    def begin(name: str) -> Ranks:
        saved = ["--save", tmp_path / name, "--load", tmp_path / name, "--save-interval", 1]
        (tmp_path / f"{name}-logs").mkdir(exist_ok=True)
        return start(data, tmp_path / f"{name}-logs", 4, *saved, *flags("do"))

    whole = Run(begin("whole").succeed())
    killed = begin("killed")
    killed.wait_until(lambda: "iteration 2/4" in killed.text())
    time.sleep(random.uniform(0, 0.15))
    assert killed.is_alive(), killed.text()
    killed.kill(0)
    assert any(killed.wait())
    ended = len(killed.logs[0].read_bytes())
    again = begin("killed").succeed()
    rest = Run(again)
    resumed = numbers(again.logs[0].read_bytes()[ended:].decode(), r"iteration (\d+)/\d+")
    assert 1 < min(resumed) <= 4
    assert rest.iterations == whole.iterations
    assert call(same_tensors, tmp_path / "whole", tmp_path / "killed", 4)


def test_a_weight_on_the_distance_keeps_the_policy_near_the_base(
    data: Path, whole: tuple[Run, Path], tmp_path: Path
) -> None:
    more = ["--kl-weight", 1, "--clip-low", 0.1, "--clip-high", 0.1]
    near = Run(start(data, tmp_path, 8, *more).succeed())
    distances = [found["kl/base"] for found in near.iterations.values()]
    far = [found["kl/base"] for found in whole[0].iterations.values()]
    assert 0 < max(distances) < 0.5 * max(far[: len(distances)])
    assert max(found["ratio/clipped"] for found in near.iterations.values()) > 0


def test_each_replica_answers_prompts_of_its_own(data: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}:", "answer": n} for n in range(8)]
    more = ["--dataset", write(tmp_path / "rows.jsonl", rows)]
    more += ["--reward", f"{data / 'rewards.py'}:number_of_row"]
    run = Run(start(data, tmp_path / "logs", 1, *more, world_size=2).succeed())
    # An iteration takes all prompts.
    assert run.rewards == [3.5]
    assert run.iterations[1]["reward/std"] == pytest.approx(2.291, abs=1e-3)
    assert run.iterations[1]["reward/no-advantage"] == 1
    assert run.iterations[1]["grad-norm"] == 0


# === What cannot be learned from ===


@pytest.mark.bad_input("a rank that fails alone")
def test_a_reward_that_fails_ends_all_ranks_with_its_row(data: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}:", "answer": "a", "shift": n} for n in range(12)]
    more = ["--dataset", write(tmp_path / "rows.jsonl", rows)]
    run = start(data, tmp_path / "logs", 4, *more, world_size=2)
    run.fail()
    found = [set(re.findall(r"ValueError: (reward .*)", log.read_text())) for log in run.logs]
    assert found[0] == found[1]
    (error,) = found[0]
    assert re.fullmatch(r"reward \S+rewards.py:letters fails for \S+rows.jsonl line 12 .*", error)


@pytest.mark.bad_input("a malformed file")
def test_a_row_that_is_no_prompt_ends_the_run_before_a_model_is_built(
    data: Path, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "1:", "answer": 1}, {"prompt": "2:"}])
    text = start(data, tmp_path / "logs", 1, "--dataset", rows).fail()
    assert "rows.jsonl line 2: no `answer`, but ['prompt']" in text
    assert "number of parameters" not in text


@pytest.mark.bad_input("a rank that disagrees")
def test_ranks_with_other_prompts_end_together(data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "rows.jsonl", [{"prompt": f"{n}:", "answer": n} for n in range(36)])
    own = ["--dataset", other]
    text = start(data, tmp_path / "logs", 1, world_size=2, of_rank_1=own).fail()
    assert "ranks disagree: dataset is" in text
    assert "give every node the same files" in text
    assert "number of parameters" not in text


def test_what_the_engine_cannot_do_is_refused_before_a_model_is_built(
    data: Path, tmp_path: Path
) -> None:
    text = start(data, tmp_path, 1, "--window-size", "4,0").fail()
    assert "window_size is (4, 0): rollouts by Megatron cannot have it" in text
    assert "number of parameters" not in text


# === Servers, and models of Hugging Face's ===


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("hugging_face")
    tokenizer = hugging_face_tokenizer()
    hf_models.hf_model("qwen3", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


SERVED = """
--cpu --tokenizer-type HuggingFaceTokenizer --lora-rank 8 --lr 1e-2 --lr-decay-style constant
--seq-length 48 --max-tokens 6 --group-size 4 --global-batch-size 16 --micro-batch-size 8
--train-iters 2
"""


@pytest.mark.parametrize(
    ("server", "layout"), [("vllm", "tp2 sp"), ("sglang", "")], ids=["vllm", "sglang"]
)
def test_a_server_answers_by_the_adapters_of_the_last_step(
    data: Path, hugging_face: Path, tmp_path: Path, server: str, layout: str
) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    chats = [
        {"prompt": [{"role": "user", "content": f"{n}?"}], "answer": letters, "shift": 0}
        for n in range(4)
    ]
    model = ["--hf-model", hugging_face, "--tokenizer-model", hugging_face, *LAYERS]
    task = ["--dataset", write(tmp_path / "chats.jsonl", chats)]
    task += ["--reward", f"{data / 'rewards.py'}:letters", "--rollout", server]
    if server == "vllm":
        task += ["--rollout-directory", tmp_path / "versions"]
    routes = {"vllm": vllm_routes, "sglang": sglang_routes}[server]
    sampler = Served(hugging_face)
    with serving(routes(sampler)) as url:
        words = [*model, *SERVED.split(), *task, *flags(layout), "--rollout-url", url]
        script = EXAMPLES / "rl_lora.py"
        size = 2 if layout else 1
        run = Ranks(size, words, tmp_path / "logs", script=script, by_megalora=False).succeed()
    iterations = Run(run).iterations
    assert len(iterations) == 2
    assert 0 < iterations[2]["gap/largest"] < 1e-4
    assert iterations[2]["kl/base"] != 0
    # Before each iteration, and the last ones for an evaluation.
    assert len(sampler.loads) == 3
