"""`megalora run` brings LoRA into launch scripts that know nothing of it."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from megalora.__main__ import main
from tests.support.examples import EXAMPLES
from tests.support.forked import SCRIPT, Ranks, free_port, with_root
from tests.support.tiny import LORA, MODEL, TRAIN, flags, train
from tests.support.watchdog import run_watched

PROVIDER_SCRIPT = SCRIPT.with_name("pretrain_provider.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "base"
    train(1, directory, "--no-save-optim", iters=1).succeed()
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and its merged weights beside it."""
    directory = tmp_path_factory.mktemp("adapter") / "run"
    more = ["--pretrained-checkpoint", base, "--save-merged", directory.parent / "merged"]
    train(1, directory, *LORA, *more, "--lora-alpha", 8).succeed()
    return directory


def start(base: Path, logs: Path, *more: object, script: Path = SCRIPT, ranks: int = 1) -> Ranks:
    given = [*MODEL, *TRAIN, "--pretrained-checkpoint", base, "--train-iters", 2]
    return Ranks(ranks, [*given, *more], logs, script=script)


def test_without_lora_rank_the_script_does_what_it_did(base: Path, tmp_path: Path) -> None:
    ours = start(base, tmp_path / "ours").succeed().losses()
    command = [sys.executable, "-c", PLAIN, str(SCRIPT), *MODEL, *TRAIN]
    command += ["--pretrained-checkpoint", str(base), "--train-iters", "2"]
    alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    env = {**os.environ, **alone, "PYTHONPATH": with_root()}
    plain = run_watched(command, tmp_path, env=env)
    assert plain.returncode == 0, plain.stderr[-3000:]
    assert len(ours) == 2
    for loss in ours.values():
        assert f"lm loss: {loss:E}" in plain.stdout


# What `python SCRIPT` does where there is no GPU to run it on.
PLAIN = """
import runpy, sys
import megalora.cpu
megalora.cpu.install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_help_of_a_script_shows_the_lora_flags(tmp_path: Path) -> None:
    text = Ranks(1, ["--help"], tmp_path / "logs").succeed().text()
    assert "--lora-rank" in text
    assert "--lora-on-corrupt" in text
    assert "--num-layers" in text


@pytest.mark.parametrize(
    "given", ["run SCRIPT --cpu --seed 1", "run --cpu SCRIPT --seed 1", "--cpu run SCRIPT --seed 1"]
)
def test_cpu_may_stand_before_the_script(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("megalora.run.run_script", lambda *words: called.append(words))
    assert main(given.split()) == 0
    [(script, words)] = called
    assert (script, sorted(words)) == ("SCRIPT", ["--cpu", "--seed", "1"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("run --lora-rank 8 pretrain.py", "--lora-rank stands before the script: give the script"),
        ("run --cpu --lora-rank 8 pretrain.py", "run SCRIPT.py --lora-rank ..."),
        ("run", "the following arguments are required: SCRIPT.py"),
        ("run --cpu", "the following arguments are required: SCRIPT.py"),
    ],
)
def test_a_command_line_without_a_script_says_the_order(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(given.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "problem"), [("gone.py", "does not exist"), (".", "is no file")]
)
def test_a_script_that_cannot_be_run_is_named(
    script: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", script, "--lora-rank", "8"]) == 2
    assert f"error: script {script!r} {problem}" in capsys.readouterr().err


def test_a_script_with_a_model_provider_trains_the_same(base: Path, tmp_path: Path) -> None:
    more = [*LORA, *flags("pp2 vpp1")]
    builder = start(base, tmp_path / "one", *more, ranks=2).succeed().losses()
    provider = start(base, tmp_path / "two", *more, ranks=2, script=PROVIDER_SCRIPT).succeed()
    assert provider.losses() == builder
    assert "> LoRA: " in provider.text()


def test_a_script_with_lora_of_its_own_gets_its_flags_and_adapters_once(
    base: Path, tmp_path: Path
) -> None:
    given = [*MODEL, *TRAIN, *LORA, "--pretrained-checkpoint", base, "--train-iters", 2, "--cpu"]
    given += ["--mock-data", "--tokenizer-type", "NullTokenizer"]
    script = EXAMPLES / "pretrain_lora.py"
    runs = [
        Ranks(1, given, tmp_path / str(by_megalora), script=script, by_megalora=by_megalora)
        for by_megalora in (False, True)
    ]
    alone, ours = (run.succeed() for run in runs)
    assert ours.losses() == alone.losses()
    assert len(ours.losses()) == 2
    assert ours.text().count("> LoRA: ") == alone.text().count("> LoRA: ") == 1


def test_a_script_that_trains_nothing_says_so(tmp_path: Path) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("print('nothing to do')\n")
    text = Ranks(1, LORA, tmp_path / "logs", script=script).fail()
    assert "the script built no model" in text


def test_merged_weights_start_a_plain_run_where_the_adapter_ended(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = adapter.parent / "merged"
    going_on = ["--lora-load", adapter, "--lora-alpha", 8]
    with_adapter = start(base, tmp_path / "one", *LORA, *going_on).succeed().losses()
    # 5 x 51 rows: Megatron alone counts what it pads by.
    unpadded = ["--make-vocab-size-divisible-by", 51]
    plain = start(merged, tmp_path / "two", *unpadded).succeed().losses()
    without = start(base, tmp_path / "three", *unpadded).succeed().losses()
    assert plain[1] == pytest.approx(with_adapter[1], rel=1e-5)
    assert abs(without[1] - plain[1]) > 1e-2


def test_loading_another_scale_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    text = start(base, tmp_path / "logs", *LORA, "--lora-load", adapter).fail()
    assert "set --lora-alpha 8" in text


def test_a_base_in_load_needs_finetune(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(base, directory)
    assert "add --finetune" in train(1, directory, *LORA).fail()
    found = train(1, directory, *LORA, "--finetune", iters=2).succeed()
    expected = start(base, tmp_path / "logs", *LORA).succeed().losses()
    assert found.losses() == expected
