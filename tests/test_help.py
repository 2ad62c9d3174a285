"""Every --help is printed: of the commands, the examples and the benchmarks."""

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest

from megalora.__main__ import main, make_parser
from tests.support.forked import ROOT, call

SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"\bparse_\w*args\(", path.read_text())
]
COMMANDS = re.findall(r"^ {4}(\S+)", make_parser("").format_help(), re.MULTILINE)


def printed(words: list[str]) -> str:
    """Return what a script or command (no file) prints before it ends with status 0."""
    sys.argv = [*words, "--help"]
    script = ROOT / words[0]
    sys.path.insert(0, str(script.parent))
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            if script.is_file():
                runpy.run_path(str(script), run_name="__main__")
            make_parser(words[0]).parse_args(sys.argv)
    except SystemExit as end:
        return out.getvalue() if not end.code else f"status {end.code}"
    except Exception as error:
        return repr(error)
    return "no help"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_prints_its_help(script: Path) -> None:
    assert "\noptions:\n" in call(printed, [str(script)])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_its_help(command: str) -> None:
    assert f"usage: megalora {command}" in call(printed, [command])


def test_the_example_shows_every_kind_of_flag_and_those_of_adapters_first() -> None:
    text = call(printed, ["examples/pretrain_lora.py"])
    flags = ("--lora-rank", "--dataset", "--hf-model", "--num-layers")
    places = [text.index(f"  {flag} ") for flag in flags]
    assert places == sorted(places)


def test_a_script_that_megalora_runs_shows_the_flags_of_adapters_first() -> None:
    text = call(printed_by_run, "tests/scripts/pretrain_tiny.py")
    usage, _, rest = text.partition("\n\n")
    assert usage == "usage: pretrain_tiny.py --lora-rank 32 <flags of the groups below>"
    places = [rest.index(f"  {flag} ") for flag in ("--lora-rank", "--hf-model", "--num-layers")]
    assert places == sorted(places)


def printed_by_run(script: str) -> str:
    """Return what `megalora run SCRIPT --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["run", str(ROOT / script), "--help"])
    return out.getvalue()
