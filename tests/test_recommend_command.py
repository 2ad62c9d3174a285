"""Recommendations for a training run's arguments, and the command line."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

from megalora.__main__ import main
from megalora.recommend import (
    Layout,
    Recommendation,
    add_parser,
    recommend,
    recommend_for_args,
)
from tests.support.sizes import (
    LLAMA,
    MEGATRON_LLAMA,
    MOE,
    RUN,
    TINY_LLAMA,
    lora,
)


def test_a_training_run_gets_what_the_function_says_for_its_flags() -> None:
    expected = recommend(
        LLAMA, lora(8), steps=50, batch_size=32, layout=Layout(tp=2, pp=2, dp=4, etp=2)
    )
    assert recommend_for_args(argparse.Namespace(**RUN), lora(8)) == expected
    assert expected.rates.multiplier == 15


def test_samples_are_counted_in_steps() -> None:
    args = argparse.Namespace(**{**RUN, "train_iters": None, "train_samples": 100 * 32})
    assert recommend_for_args(args, lora(8)).rates.multiplier == 10


def test_the_base_folder_of_a_run_tells_its_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, "model_type": "qwen3"}))
    args = argparse.Namespace(**{**RUN, "num_layers": 3, "hf_model": str(tmp_path)})
    assert recommend_for_args(args, lora(8)).rates.family == "qwen"


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["recommend", *arguments])


def test_the_command_prints_the_functions_numbers_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = ("--tp", "4", "--ep", "8", "--etp", "1", "--dp", "2")
    args = command("--model", "qwen3-30b-a3b", "--rank", "32", "--tokens", "100", *layout, "--json")
    assert args.func(args) == 0
    printed = json.loads(capsys.readouterr().out)
    expected: Recommendation = recommend(
        MOE, lora(32), tokens=100, layout=Layout(tp=4, ep=8, etp=1, dp=2)
    )
    assert printed == json.loads(json.dumps(expected.to_dict()))
    assert printed["trainable_parameters"]["all"] == 239_284_224


def test_the_table_shows_the_rate_the_regime_and_the_notes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = command("--model", "llama-3.1-8b", "--rank", "32", "--tokens", "1000000000")
    args.func(args)
    printed = capsys.readouterr().out
    for part in ("2.86e-04", "88,121,344", "smallest rank 256", "note: rank 32 does not hold"):
        assert part in printed


def test_the_command_takes_megatron_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = []
    for name, value in MEGATRON_LLAMA.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    args = command("--rank", "8", "--json", *flags)
    args.func(args)
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "llama-3.1-8b"


def test_a_dataset_is_counted_by_its_trained_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a", "completion": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    args = command(
        *("--model", "llama-3.1-8b", "--rank", "8", "--json"),
        *("--dataset", str(path), "--tokenizer", "byte"),
    )
    args.func(args)
    # Three and one bytes, and the end of each.
    assert json.loads(capsys.readouterr().out)["capacity"]["data_bits"] == 6


def test_a_dataset_without_a_tokenizer_is_refused() -> None:
    args = command("--model", "llama-3.1-8b", "--rank", "8", "--dataset", "stdlib-text")
    with pytest.raises(ValueError, match="--tokenizer"):
        args.func(args)


def test_a_reader_that_has_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `megalora recommend ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["recommend", "--model", "qwen3-30b-a3b", "--rank", "32"]) == 128 + 13
    assert not capsys.readouterr().err
