"""The preference example learns, says how it goes, and goes on where it stopped."""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.examples import EXAMPLES, run_example
from tests.support.forked import Ranks, call
from tests.support.tiny import MODEL, back_to, same_tensors
from tests.test_data import write_jsonl

ITERATIONS, HALF, LOGGED = 8, 4, 4
FLAGS = [word for word in MODEL if word not in ("--vocab-size", "255")]
FLAGS += f"""
--num-layers 2 --seq-length 32 --max-position-embeddings 32 --cpu --byte-tokenizer --lora-rank 4
--lr 2e-3 --lr-decay-style constant --micro-batch-size 4 --global-batch-size 8 --beta 0.5
--eval-interval {HALF} --eval-iters 2 --dataset-valid-fraction 0.2 --save-interval {HALF}
--train-iters {ITERATIONS}
""".split()
METRICS = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]


def row(number: int) -> dict[str, Any]:
    """Prefer kindness, of several words and to several questions."""
    good, bad = ("Sure.", "Gladly.", "Yes!")[number % 3], ("No.", "Go!", "Why?")[number // 3 % 3]
    question = {"role": "user", "content": f"Help {chr(97 + number % 26)}?"}
    answers = ({"role": "assistant", "content": f"{text} {number}"} for text in (good, bad))
    chosen, rejected = ([question, answer] for answer in answers)
    return {"chosen": chosen, "rejected": rejected}


class Lines:
    """The metrics of each iteration, and of the held-out pairs after some."""

    def __init__(self, text: str) -> None:
        self.trained = self._read(text, r"^iteration (\d+)/\d+ \| (.*)$")
        self.held_out = self._read(text, r"^held out after iteration (\d+) \| (.*)$")

    def _read(self, text: str, pattern: str) -> dict[int, dict[str, float]]:
        found = {}
        for number, metrics in re.findall(pattern, text, re.MULTILINE):
            pairs = (metric.rsplit(": ", 1) for metric in metrics.split(" | "))
            found[int(number)] = {name: float(value) for name, value in pairs}
        return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "x.jsonl", [row(k) for k in range(50)])


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lines, str]:
    directory = tmp_path_factory.mktemp("whole")
    outputs = ["--save", directory / "saved", "--export-hf", directory / "adapter"]
    outputs += ["--tensorboard-dir", directory / "tensorboard", "--lora-log-interval", LOGGED]
    text = run_example("dpo_lora.py", [*FLAGS, "--dataset", dataset, *outputs], directory / "logs")
    return directory, Lines(text), text


def test_held_out_pairs_are_told_apart(whole: tuple[Path, Lines, str]) -> None:
    _, lines, text = whole
    first = lines.trained[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # But for rounding: which of two answers is above the other by it is of no matter.
    assert [first[name] for name in METRICS[1:4]] == pytest.approx([0.0] * 3, abs=1e-6)
    assert list(lines.held_out) == [HALF, ITERATIONS]
    half, last = lines.held_out.values()
    assert list(last) == METRICS
    assert last["loss"] < half["loss"] < first["loss"]
    assert last["rewards/accuracies"] > 0.85
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], rel=1e-4
    )
    assert "train data: 40 pairs, " in text
    assert "valid data: 10 pairs, " in text


def test_a_resumed_run_goes_on_bit_for_bit(
    whole: tuple[Path, Lines, str], dataset: str, tmp_path: Path
) -> None:
    directory, lines, _ = whole
    saved = back_to(directory / "saved", tmp_path / "saved", HALF)
    flags = [*FLAGS, "--dataset", dataset, "--save", saved, "--load", saved]
    rest = Lines(run_example("dpo_lora.py", flags, tmp_path / "logs"))
    assert rest.trained == {n: lines.trained[n] for n in range(HALF + 1, ITERATIONS + 1)}
    assert rest.held_out == {ITERATIONS: lines.held_out[ITERATIONS]}
    assert same_tensors(directory / "saved", saved, ITERATIONS)


def test_tensorboard_gets_what_is_printed(whole: tuple[Path, Lines, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, lines, _ = whole
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    for prefix, printed in (("", lines.trained), ("eval/", lines.held_out)):
        for name in next(iter(printed.values())):
            written = {event.step: event.value for event in events.Scalars(prefix + name)}
            assert written == pytest.approx({n: m[name] for n, m in printed.items()}, rel=1e-5)
    grown = [(event.step, event.value) for event in events.Scalars("lora/update/all")]
    assert [step for step, _ in grown] == list(range(LOGGED, ITERATIONS + 1, LOGGED))
    assert 0 < grown[0][1] < grown[-1][1]


def test_the_adapter_is_exported(whole: tuple[Path, Lines, str]) -> None:
    directory, _, _ = whole
    assert json.loads((directory / "adapter" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.bad_input("a malformed file")
def test_a_row_without_a_preference_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    rows = [row(k) for k in range(50)]
    rows[30]["rejected"] = rows[30]["chosen"]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    flags = [*FLAGS, "--dataset", path, "--save", tmp_path / "saved"]
    env = {"MEGALORA_TRACEBACK": ""}
    script = EXAMPLES / "dpo_lora.py"
    text = Ranks(1, flags, tmp_path / "logs", script=script, by_megalora=False, env=env).fail()
    assert f"error: dataset {path} line 31: `chosen` and `rejected` are equal" in text
    assert "Traceback" not in text
    assert not (tmp_path / "saved").exists()


# Changes of flags that the loop takes, and how it refuses them.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"beta": 0.0}, "beta is 0.0"),
    ({"label_smoothing": 0.6}, "label_smoothing is 0.6"),
    ({"dataset": None}, "dataset is not given: set --dataset"),
    ({"eval_interval": None}, "eval_interval is not given: set --eval-interval 1000, and"),
    ({"lora_rank": 0}, "lora_rank is 0"),
    ({"lora_dropout": 0.1}, "lora_rank is 8 and lora_dropout 0.1"),
    ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
    ({"mtp_num_layers": 1}, "mtp_num_layers is 1, which this loop does not do: leave --mtp"),
]


def refusals() -> list[str]:
    """Return what `check_args` says of each."""
    from examples.dpo_lora import check_args

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    fields: dict[str, Any] = {
        **{"beta": 0.1, "label_smoothing": 0.0, "lora_rank": 8, "lora_dropout": None},
        **{"dataset": "x", "train_iters": 8, "eval_interval": 4},
        **{"skip_train": False, "train_samples": None, "lr": 1e-3},
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
        **dict.fromkeys(("calculate_per_token_loss", "full_validation", "exit_signal_handler")),
        **dict.fromkeys(("mtp_num_layers", "rampup_batch_size", "dataset_test_split")),
        **dict.fromkeys(("exit_interval", "exit_duration_in_mins")),
    }
    said = []
    for changes, _ in REFUSED:
        try:
            check_args(argparse.Namespace(**fields | changes))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_the_loop_cannot_do_is_refused() -> None:
    for said, (_, expected) in zip(call(refusals), REFUSED, strict=True):
        assert said.startswith(expected)
        assert bool(said) == bool(expected)
