"""`megalora plan`: what it is given, what it prints, and that it leaves everything alone."""

import json
import re
from pathlib import Path

import pytest

from megalora.__main__ import main
from megalora.plan.cli import split
from tests.support.examples import EXAMPLES
from tests.support.forked import SCRIPT
from tests.support.planning import TINY, plan

TWO_STAGES = ("--pipeline-model-parallel-size", 2)


@pytest.mark.parametrize(
    ("given", "own", "rest"),
    [
        ("--world-size 8 S.py --lr 1", "--world-size 8 S.py", "--lr 1"),
        (
            "--world-size=8 --rank 3 S.py --rank 4 --help",
            "--world-size=8 --rank 3 S.py",
            "--rank 4 --help",
        ),
        ("--hf-model D --world-size 8 --bf16", "--world-size 8", "--hf-model D --bf16"),
        ("--world-size 8 --model M --json - --lr 1", "--world-size 8 --model M --json -", "--lr 1"),
        ("--world-size 8 --bf16 --help", "--help", ""),
    ],
)
def test_what_follows_a_script_is_the_scripts(given: str, own: str, rest: str) -> None:
    assert split(given.split()) == (own.split(), rest.split())


def test_a_plan_fits_one_screen_and_its_json_has_all(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    ended = plan("--world-size", 8, "--json", file, SCRIPT, *TINY, *TWO_STAGES, "--mock-data")
    assert ended.status == 0, ended.err
    assert len(ended.out.splitlines()) <= 45
    found = json.loads(file.read_text())
    assert (found["schema"], found["fits"], found["would_fit"]) == (1, True, [])
    assert [one["rank"] for one in found["ranks"]] == [0, 4]
    assert found["run"]["layout"]["pipeline"] == 2
    fullest = max(found["ranks"], key=lambda one: one["peak"])
    assert found["fullest"] == fullest["rank"]
    memory = fullest["memory"]
    assert f"{memory['trained']:,} trained" in ended.out
    # As two stages: each has half of the adapters.
    trained = sum(one["memory"]["trained"] for one in found["ranks"])
    assert trained == found["run"]["adapters"]["parameters"]
    assert list(tmp_path.iterdir()) == [file]


def test_where_it_does_not_fit_it_says_what_would() -> None:
    given = ("--world-size", 8, "--json", "-", SCRIPT, "--mock-data", *TINY, "--num-layers", 2)
    given += ("--micro-batch-size", 4, "--global-batch-size", 32)
    whole = json.loads(plan(*given).out)
    [rank] = whole["ranks"]
    # One byte is missing.
    ended = plan("--gpu-memory", (rank["peak"] - 1) / 2**30, *given)
    assert ended.status == 1, ended.err
    found = json.loads(ended.out)
    assert not found["fits"]
    assert len(found["would_fit"]) == 3
    last = found["would_fit"][-1]
    # It is no estimate: so says the plan with these flags.
    ended = plan("--rank", last["rank"], *given, *last["flags"])
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["ranks"][0]["peak"] == last["peak"] < rank["peak"]


def test_nothing_is_written_and_what_is_not_here_is_said(tmp_path: Path) -> None:
    base = tmp_path / "here"
    base.mkdir()
    gone = "/cluster/of/others"
    ended = plan(
        *("--world-size", 4, EXAMPLES / "pretrain_lora.py", *TINY, "--lr", "auto"),
        *("--lora-family", "qwen", "--save", base, "--load", base, "--save-interval", 1),
        *("--pretrained-checkpoint", f"{gone}/base", "--dataset", f"{gone}/chats.jsonl"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{gone}/tokenizer"),
        *("--lora-load", f"{gone}/adapter", "--export-hf", f"{gone}/out"),
        *("--save-merged", tmp_path / "merged", "--tensorboard-dir", tmp_path / "tensorboard"),
        *("--log-progress", "--async-save", "--use-persistent-ckpt-worker"),
    )
    assert ended.status == 0, ended.err
    assert ended.changed == []
    assert list(tmp_path.rglob("*")) == [base]
    [note] = [line for line in ended.out.splitlines() if "not on this machine" in line]
    for flag in ("pretrained-checkpoint", "dataset", "tokenizer-model", "lora-load"):
        assert f"--{flag} {gone}" in note
    assert "--load" not in note.replace("--lora-load", "")


def test_a_config_json_is_all_that_is_needed_of_a_hugging_face_model(tmp_path: Path) -> None:
    config = {
        **{"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256},
        **{"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "tie_word_embeddings": False, "max_position_embeddings": 64},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = ("--seq-length", 32, "--micro-batch-size", 1, "--global-batch-size", 4, "--bf16")
    run += ("--train-iters", 2, "--lora-rank", 4, "--transformer-impl", "local")
    ended = plan("--world-size", 4, "--json", "-", "--hf-model", tmp_path, *run)
    assert ended.status == 0, ended.err
    [rank] = json.loads(ended.out)["ranks"]
    # Two embeddings; attention, two norms of heads and two of the layer, mlp; the last norm.
    layer = 64 * (4 + 2 * 2) * 16 + 64 * 64 + 2 * 16 + 2 * 64 + 3 * 64 * 96
    assert rank["memory"]["frozen"] == 2 * 256 * 64 + 2 * layer + 64


def test_the_help_of_a_script_is_shown() -> None:
    ended = plan("--world-size", 8, SCRIPT, "--help")
    assert ended.status == 0
    assert "--num-layers" in ended.err
    assert "--lora-rank" in ended.err


# === What is wrong is said once, in a sentence ===


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (8, ("--lora-targets", "nothing"), "nothing"),
        (8, ("--lora-rnk", 4), "unrecognized arguments: --lora-rnk"),
        (8, ("--tensor-model-parallel-size", 3), "needs 3 processes or a multiple of them, but"),
        (8, ("--global-batch-size", 7), "is not divisible by micro_batch_size 1 x 8"),
        (
            8,
            (
                "--tokenizer-type",
                "HuggingFaceTokenizer",
                "--tokenizer-model",
                "/gone",
                "--vocab-size",
                0,
            ),
            "tokenizer_model '/gone' is not on this machine: add --vocab-size",
        ),
        (8, ("--use-checkpoint-args", "--load", "/gone"), "give them on the command line"),
        (8, ("--hf-model", "/gone"), "/gone"),
    ],
)
def test_flags_that_would_end_the_run_end_the_plan(
    world_size: int, flags: tuple[object, ...], message: str
) -> None:
    ended = plan("--world-size", world_size, SCRIPT, "--mock-data", *TINY, *flags)
    assert (ended.status, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    assert re.match(rf"error: .*{message}", line), line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--world-size", 8, "gone.py"), "script 'gone.py' does not exist"),
        (("--world-size", 8, "--rank", 8, SCRIPT), "rank is 8: give one from 0 to 7"),
        (("--world-size", 12, SCRIPT), "world_size 12 does not fill nodes of 8 GPUs"),
        (("--world-size", 8, "--model", "gpt-5"), "one of llama-3.2-1b"),
    ],
)
def test_a_command_line_that_names_nothing_is_refused(
    words: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *map(str, words)]) == 2
    assert re.search(rf"^error: .*{message}", capsys.readouterr().err)


def test_a_script_without_a_model_says_so(tmp_path: Path) -> None:
    script = tmp_path / "nothing.py"
    script.write_text("print('nothing to do')\n")
    ended = plan("--world-size", 8, script, *TINY)
    assert ended.status == 2
    assert "built no model through megatron.training.pretrain" in ended.err


@pytest.mark.bad_input("a rank that fails alone")
@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            "os.kill(os.getpid(), 9)",
            "was ended by SIGKILL, as the system does where memory runs out",
        ),
        ("os._exit(3)", "ended with status 3 and without a word"),
        ("raise RuntimeError('badly made')", "RuntimeError: badly made"),
        ("sys.exit('error: not like this')", "not like this"),
    ],
)
def test_a_process_that_dies_ends_the_plan(tmp_path: Path, does: str, message: str) -> None:
    script = tmp_path / "dies.py"
    script.write_text(f"import os, sys\nprint('the last word', flush=True)\n{does}\n")
    ended = plan("--world-size", 8, script, *TINY)
    assert ended.status == 2
    assert message in ended.err.splitlines()[-1]
    # A sentence of the script's own needs no more.
    assert ("the last word" in ended.err) == ("sys.exit" not in does)


@pytest.mark.bad_input("a write that fails")
@pytest.mark.parametrize(
    ("file", "message"),
    [("taken", "is a directory: give a file"), ("gone/plan.json", "gone is no directory")],
)
def test_a_json_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    # There is no such script either, which is looked for later.
    assert main(["plan", "--world-size", "1", "--json", str(tmp_path / file), "gone.py"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: json ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
