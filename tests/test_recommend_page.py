"""What the documents say of `megalora recommend` is what it prints."""

import re
import shlex

import pytest

from megalora.__main__ import main
from tests.support.forked import ROOT

PAGE = (ROOT / "docs" / "recommend.md").read_text()
SHOWN = re.findall(r"^\$ megalora (recommend .*)\n((?:.+\n)+?)```", PAGE, re.MULTILINE)
ROW = re.compile(
    r"^\| `([^`]+)`.* \| ([\d,]+) \((\S+) %\) \| (\S+)e-(\d) \| (\S+) \|$", re.MULTILINE
)
OF_EXPERTS = ("experts 207,618,048", "239,284,224"), ("experts 462,422,016",)


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(command)) == 0
    return capsys.readouterr().out


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert SHOWN
    for command, output in SHOWN:
        assert output == printed(command, capsys)


def test_the_table_has_the_numbers_of_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = ROW.findall(PAGE)
    assert len(rows) == 3
    for model, trainable, share, rate, power, flops in rows:
        said = printed(f"recommend --model {model} --rank 32", capsys)
        for number in (f"{trainable} ({share}%", f"LoRA {rate}e-0{power},", f" {flops} of a full"):
            assert number in said, f"{model}: {number} in\n{said}"


def test_the_page_on_experts_has_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "moe.md").read_text()
    for mode, numbers in zip(("per_expert", "shared_outer"), OF_EXPERTS, strict=True):
        said = printed(f"recommend --model qwen3-30b-a3b --rank 32 --expert-mode {mode}", capsys)
        for number in numbers:
            assert number in said
            assert number.removeprefix("experts ") in page
