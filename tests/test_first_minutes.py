"""What a newcomer types wrong ends in one sentence that says what to type instead."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora import installed
from megalora.__main__ import main
from megalora.misspelt import explain, nearest
from megalora.training.needed import (
    check_gpu,
    check_needed,
    check_rate,
    check_started,
    check_training_args,
    said_by_megatron,
)

WRONG = pytest.mark.bad_input("a mistyped command line")
GIVEN = {
    **{"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 2},
    **{"max_position_embeddings": 16, "seq_length": 16, "encoder_seq_length": None},
    **{"micro_batch_size": 2, "global_batch_size": 8, "rampup_batch_size": None},
    **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1},
    **{"context_parallel_size": 1, "world_size": 4, "bf16": False, "fp16": False},
    **{"group_query_attention": True, "step_batch_size_schedule": None},
    **{"hybrid_layer_pattern": None, "decrease_batch_size_if_needed": False},
}
NEEDED = {
    "num_layers=None": "num_layers is not given: set --num-layers and .*, or --hf-model DIR",
    "max_position_embeddings=None": "set --max-position-embeddings and the model's other sizes",
    "micro_batch_size=None": "micro_batch_size is not given: set --micro-batch-size 1 or more",
    "seq_length=None": "seq_length is not given: set --seq-length",
    "seq_length=32": "seq_length 32 is longer than the model's 16 positions: lower --seq-length",
    "num_attention_heads=5": "num_attention_heads 5 is not divisible by num_query_groups 2",
    "bf16=1 fp16=1": "leave one of --bf16 and --fp16 out",
    "world_size=1": "tensor_model_parallel_size 2 needs 2 processes .* but this run has 1: start "
    "it by `torchrun --nproc-per-node 2",
    "world_size=6 pipeline_model_parallel_size=2": "tensor_model_parallel_size 2 x "
    "pipeline_model_parallel_size 2 needs 4 processes",
    "global_batch_size=6": "global_batch_size 6 is not divisible by micro_batch_size 2 x 2 .*: set "
    "--global-batch-size to a multiple of 4",
}


def flags(text: str = "") -> argparse.Namespace:
    """Return flags that are right, but for those written as `name=value`."""
    changed = {}
    for word in text.split():
        name, _, value = word.partition("=")
        changed[name] = None if value == "None" else int(value)
    return argparse.Namespace(**{**GIVEN, **changed})


@pytest.mark.parametrize("wrong", NEEDED)
@WRONG
def test_a_flag_that_is_missing_or_does_not_fit_is_named_with_what_to_set(wrong: str) -> None:
    with pytest.raises(ValueError, match=NEEDED[wrong]):
        check_needed(flags(wrong), {})


@pytest.mark.parametrize(
    ("right", "defaults"),
    [
        ("", {}),
        ("seq_length=None encoder_seq_length=16", {}),
        ("micro_batch_size=None", {"micro_batch_size": 2}),
        ("num_layers=None hybrid_layer_pattern=1", {}),
        ("global_batch_size=None", {}),
        ("global_batch_size=6 rampup_batch_size=1", {}),
        ("global_batch_size=6 decrease_batch_size_if_needed=1", {}),
    ],
)
def test_what_megatron_takes_is_not_refused(right: str, defaults: dict[str, object]) -> None:
    check_needed(flags(right), defaults)


TRAINS = {"train_iters": 3, "train_samples": None, "lr": 0.1, "eval_interval": 10}
TRAINING = {
    "train_iters": "train_iters is not given: set --train-iters",
    "lr": "lr is not given: set --lr auto .*, or --lr and a number",
    "eval_interval": "eval_interval is not given: set --eval-interval 1000, and --eval-iters 0",
}


@pytest.mark.parametrize("missing", TRAINING)
@WRONG
def test_a_run_without_an_end_a_rate_or_an_evaluation_is_told_what_to_set(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    more = {"skip_train": False, "full_validation": False}
    with pytest.raises(ValueError, match=TRAINING[missing]):
        check_training_args(argparse.Namespace(**{**TRAINS, **more, missing: None}))
    check_training_args(argparse.Namespace(**TRAINS, **more))
    check_training_args(
        argparse.Namespace(**{**TRAINS, **more, "eval_interval": None}), evaluates=False
    )
    check_training_args(argparse.Namespace(**{**TRAINS, missing: None, "skip_train": True}))


@WRONG
def test_a_rate_that_is_none_is_no_sum_of_nothing() -> None:
    with pytest.raises(ValueError, match="set --lr auto"):
        check_rate(None)


def raised(code: str, file: Path) -> AssertionError:
    """Return what code of a file asserts."""
    file.parent.mkdir(parents=True)
    file.write_text(code)
    try:
        exec(compile(code, str(file), "exec"), {})
    except AssertionError as error:
        return error
    raise TypeError("nothing was asserted")


def test_a_bare_assertion_of_megatron_is_said_by_its_text(tmp_path: Path) -> None:
    code = "tp = 1\nassert tp > 1"
    said = said_by_megatron(raised(code, tmp_path / "megatron" / "training" / "arguments.py"))
    assert said == ("it asks for `tp > 1` (Megatron's own check, megatron/training/arguments.py:2)")
    assert not said_by_megatron(raised(code, tmp_path / "other" / "arguments.py"))


@WRONG
def test_a_script_that_no_launcher_started_is_told_to_use_torchrun() -> None:
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with pytest.raises(ValueError, match=r"MASTER_PORT not set, .*: start `torchrun --nproc-per-"):
        check_started({"MASTER_ADDR": "localhost"})
    check_started(environ)


@WRONG
def test_a_rank_without_a_gpu_of_its_own_is_told_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2, .* 2 GPUs: .*--nproc-per-node 2"):
        check_gpu(2, {"LOCAL_RANK": "2"})
    for environ in ({}, {"LOCAL_RANK": "1"}):
        check_gpu(2, environ)


# === Words that nothing is called ===


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--lora_rank", "--lora-rank"), ("--lora-ranks=8", "--lora-rank"), ("--warmup", None)],
)
def test_the_flag_that_was_meant_is_found(typed: str, meant: str | None) -> None:
    assert nearest(typed, ["--lora-rank", "--lora-alpha", "--num-layers"]) == meant


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora_rank 8", "unrecognized arguments: --lora_rank 8: did you mean --lora-rank?"),
        ("8", "unrecognized arguments: 8: each value needs its flag before it, see --help"),
        ("--zzz", "unrecognized arguments: --zzz: no flag is called so, see --help"),
    ],
)
@WRONG
def test_an_unknown_flag_of_a_script_is_followed_by_what_to_type(words: str, said: str) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora-rank")
    assert explain(f"unrecognized arguments: {words}", parser) == said
    assert explain("argument --lora-rank: expected one argument", parser).endswith("one argument")


COMMANDS = {
    "": "the following arguments are required: COMMAND (see `megalora --help`)",
    "exprot": "invalid choice: 'exprot'",
    "--lora-rank 8": "--lora-rank",
    "run": "required: SCRIPT.py (see `megalora run --help`)",
    "run --lora-rank 8 x.py": "give the script first, then its flags and those of LoRA",
    "run gone.py": "script 'gone.py' does not exist: give the path of a launch script",
    "export": "required: checkpoint, --output (see `megalora export --help`)",
    "export gone --output out": "checkpoint 'gone' does not exist: give what --save of a training",
    "export file --output out": "checkpoint 'file' is no directory: give what --save",
    "export model --output out": "is a whole model, no adapter: give it as --hf-model",
    "export peft --output out": "is a PEFT directory already: use it as it is",
    "inspect gone": "checkpoint 'gone' does not exist: give what --save",
    "merge gone --hf-model model --output out": "gone does not exist: give the directory of an",
    "import peft --hf-model Qwen/Qwen3-8B --output out": "Qwen/Qwen3-8B is no directory here: .* "
    "`hf download Qwen/Qwen3-8B --local-dir Qwen3-8B` makes",
    "flags --hf_model model": "unrecognized arguments: --hf_model: did you mean --hf-model?",
    "flags --hf-model /gone": "/gone is no directory here: give one that has a model's config.json",
    "recommend": "required: --rank",
    "recommend --ranks 8": "did you mean --rank?",
    "inspect peft --hf-model model": "--hf-model model: no flag is called so",
    "plan": "required: --world-size",
    "check peft": "required: --for",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work beside a file, a model and an adapter, which hold nothing but their names."""
    (tmp_path / "file").touch()
    for path in ("model/config.json", "model/model.safetensors", "peft/adapter_config.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("{}")
    (tmp_path / "peft" / "adapter_model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", COMMANDS)
@WRONG
def test_a_wrong_command_ends_in_one_sentence(
    line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(line.split())
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    first, _, last = COMMANDS[line].partition(" .* ")
    assert first in err
    assert last in err


# === Megatron that is missing, or another ===


@pytest.fixture
def megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return what puts a megatron-core that says its version in the place of the real one."""

    def put(text: str) -> Path:
        (tmp_path / "package_info.py").write_text(text)
        monkeypatch.setattr(installed, "place_of", lambda module: tmp_path)
        return tmp_path

    return put


@WRONG
def test_an_older_megatron_is_refused_by_its_version(megatron: Callable[[str], Path]) -> None:
    directory = megatron("MAJOR = 0\nMINOR = 15\nPATCH = 2\n")
    with pytest.raises(
        ValueError, match=r"is 0.15 in .*older than .* 0.19 and 0.20: pip install 'megatron-core>="
    ) as refused:
        installed.check_megatron()
    assert str(directory) in str(refused.value)


@pytest.mark.parametrize("text", ["MAJOR = 0\nMINOR = 19\n", "MAJOR = 1\nMINOR = 0\n", ""])
def test_a_known_newer_or_silent_megatron_is_looked_at_where_it_is_replaced(
    text: str, megatron: Callable[[str], Path]
) -> None:
    megatron(text)
    installed.check_megatron()


@pytest.mark.parametrize("missing", ["megatron.core", "megatron.training"])
@WRONG
def test_a_missing_megatron_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        installed, "place_of", lambda module: None if module == missing else Path("x")
    )
    with pytest.raises(
        ValueError, match=f"{missing} is not installed for this Python: pip install"
    ):
        installed.check_megatron()


def test_the_megatron_that_is_installed_here_is_known() -> None:
    assert installed.place_of("megatron.core")
    assert installed.place_of("megatron.none") is None
    assert installed.place_of("no_such_package.core") is None
    installed.check_megatron()
