"""What is not finite in a running step: who says so, in which adapter, and that it is not saved."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.forked import SCRIPT, Ranks
from tests.support.tiny import LORA, MODEL, TRAIN, flags, train

NUMBERS = pytest.mark.bad_input("a number that is not one")
BROKEN = SCRIPT.with_name("pretrain_broken.py")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of two ranks: what becomes infinite, what its rank says of it, and how it ends."""

    layout: str
    breaks: str
    said: str
    flags: tuple[str, ...] = ()
    code: int = 16


def start(directory: Path, layout: str, breaks: str, *more: str) -> Ranks:
    options = [*LORA, *flags(layout), *more, "--save-interval", "2"]
    env = {"BREAK": breaks, "MEGALORA_TRACEBACK": ""}
    return train(2, directory, *options, script=BROKEN, env=env)


def errors(run: Ranks) -> list[list[str]]:
    """Return the lines of each rank that begin as errors do."""
    return [re.findall(r"^error: .*", log.read_text(), re.MULTILINE) for log in run.logs]


def said_last(run: Ranks) -> str:
    """Return what the rank says that ends the run: all meet the same error, and one says it."""
    (last,) = {said[-1] for said in errors(run) if said and " is not saved" in said[-1]}
    return last


CASES = {
    "an adapter of the second stage": Case(
        layout="pp2",
        breaks="1 3 linear_fc2_lora.lora_A",
        said="in adapter decoder.layers.2.mlp.linear_fc2_lora.lora_A (1 of 768); gradient decoder",
        code=1,
    ),
    "a base weight": Case(
        layout="dp",
        breaks="1 3 linear_proj.weight",
        said="in base weight decoder.layers.0.self_attention.linear_proj.weight (1 of 4,096); grad",
    ),
    "a gradient, without reruns": Case(
        layout="dp",
        breaks="1 3 main_grad of linear_qkv_lora.lora_B",
        said="in gradient decoder.layers.0.self_attention.linear_qkv_lora.lora_B (1 of 1,024): ",
        flags=("--rerun-mode", "disabled"),
        code=1,
    ),
}


@NUMBERS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rank_that_has_it_names_it(case: Case, tmp_path: Path) -> None:
    run = start(tmp_path / "run", case.layout, case.breaks, *case.flags)
    assert case.code in run.wait()
    first = errors(run)[1][0]
    assert first.startswith("error: found "), first
    assert f"on rank 1 in iteration 3, NaN or infinite values are {case.said}" in first
    # Where Megatron asks for another checkpoint, to see the step again elsewhere, it stays whole.
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "run" / "iter_0000002" / "integrity.json").is_file()


@NUMBERS
def test_the_first_step_is_told_apart_from_what_it_spoils(tmp_path: Path) -> None:
    run = start(tmp_path / "run", "dp", "1 1 main_grad of linear_qkv_lora.lora_B")
    assert 1 in run.wait()
    first, *later = errors(run)[1]
    assert "in iteration 1, NaN or infinite values are in gradient decoder.layers.0.self" in first
    assert "in iteration 2, NaN or infinite values are in adapter decoder" in later[0]
    assert "checkpoint of iteration 1 is not saved: training diverged" in said_last(run)
    assert not list((tmp_path / "run").glob("iter_*"))


@NUMBERS
def test_without_the_check_nothing_is_looked_at_and_nothing_is_saved(tmp_path: Path) -> None:
    run = start(
        tmp_path / "run",
        "dp",
        "1 3 linear_fc2_lora.lora_A",
        "--no-check-for-nan-in-loss-and-grad",
    )
    assert 1 in run.wait()
    assert "grad norm: nan" in run.logs[-1].read_text()
    assert sum(map(len, errors(run))) == 1
    assert "checkpoint of iteration 4 is not saved" in said_last(run)
    assert not (tmp_path / "run" / "iter_0000004").exists()


@NUMBERS
def test_a_base_that_is_not_finite_is_refused_before_training(tmp_path: Path) -> None:
    more = ["--init-method-std", "1e39", "--save", tmp_path / "run", "--train-iters", "2"]
    env = {"MEGALORA_TRACEBACK": ""}
    run = Ranks(2, [*MODEL, *TRAIN, *LORA, *flags("pp2"), *more], tmp_path / "logs", env=env)
    assert 1 in run.wait()
    assert re.search(
        r"^error: base has NaN or infinite weights in decoder\.layers\.mlp\.linear_fc1\.weight, .* "
        r"and \d+ more: give another --pretrained-checkpoint",
        run.text(),
        re.MULTILINE,
    )
    assert run.losses() == {}
    assert not any((tmp_path / "run").iterdir())
