"""How many bad inputs the tests give, by kind: SECURITY.md's table.

`python -m tests.support.bad_inputs` collects all tests and writes the table anew.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.support.forked import ROOT, SCRIPT, Ranks

SECURITY = ROOT / "SECURITY.md"
BEGIN, END = "<!-- From here by tests/support/bad_inputs.py. -->\n", "<!-- To here. -->\n"
WORLDS = ROOT / "tests" / "dist"
MARKER = "bad_input"
PLUGIN = "tests.support.bad_inputs"
# Where this module, as a plugin of pytest, writes what it counts.
RESULT = "MEGALORA_BAD_INPUTS"

# What each kind of bad input comes to.
KINDS = {
    "code in a file": "refused, and nothing has run",
    "a directory that is not ours": "left as it was",
    "a write that fails": "one sentence, nothing half written, nothing left behind",
    "a number that is not one": "refused by name",
    "a malformed file": "one sentence that names the file, or read rightly",
    "work without bound": "refused before the work",
    "a rank that disagrees": "every rank ends with the field and both values",
    "a rank that fails alone": "every rank ends, its sentence is said once",
    "a mistyped command line": "one sentence that says what to type, before any work",
}


def count(items: Iterable[pytest.Item]) -> Counter[str]:
    """Return how many tests give each kind of bad input."""
    marks = (item.get_closest_marker(MARKER) for item in items)
    return Counter(mark.args[0] for mark in marks if mark)


def count_in_worlds(logs: Path) -> Counter[str]:
    """Return the same of the tests that need other processes; logs: an empty directory."""
    result = logs / "counts.json"
    words = [WORLDS, "--collect-only", "-q", "-p", "no:cacheprovider", "-p", PLUGIN]
    script = SCRIPT.with_name("run_pytest.py")
    env = {RESULT: str(result)}
    Ranks(1, words, logs, script=script, by_megalora=False, env=env).succeed()
    return Counter(json.loads(result.read_text()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write down the counts of a collection, where this module is a plugin."""
    if RESULT in os.environ:
        Path(os.environ[RESULT]).write_text(json.dumps(count(session.items)))


def table(counts: Mapping[str, int]) -> str:
    """Return the table in Markdown; KeyError for a kind that has no row."""
    if unknown := counts.keys() - KINDS:
        raise KeyError(f"tests mark bad inputs of kinds that have no row: {sorted(unknown)}")
    rows = ["| What comes | tried | What it comes to |", "|---|---|---|"]
    rows += [f"| {kind} | {counts[kind]} | {end} |" for kind, end in KINDS.items()]
    return "\n".join([*rows, f"| together | {sum(counts.values())} | |", ""])


def rewritten(text: str, counts: Mapping[str, int]) -> str:
    """Return SECURITY.md with the table of these counts."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(counts) + END + rest.split(END)[1]


def main() -> None:
    """Collect all tests and write the table."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory) / "here.json"
        os.environ[RESULT] = str(here)
        code = pytest.main(["--collect-only", "-q", "-p", PLUGIN, str(ROOT / "tests")])
        if code:
            sys.exit(code)
        counts = Counter(json.loads(here.read_text())) + count_in_worlds(Path(directory) / "worlds")
    SECURITY.write_text(rewritten(SECURITY.read_text(), counts))


if __name__ == "__main__":
    main()
