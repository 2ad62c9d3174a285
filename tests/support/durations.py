"""List the slowest tests of the last `make test`, those inside the worlds of ranks too.

`python -m tests.support.durations FILE` reads the report that pytest wrote by `--junitxml FILE`.
"""

import argparse
import datetime
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

# What a test that starts a world records: [seconds, name] of each test that its ranks ran.
WORLD = "tests of a world"
LISTED = 20


class Test(NamedTuple):
    """A test with its fixtures; `world`: it runs others inside, which are listed themselves."""

    __test__ = False
    seconds: float
    name: str
    world: bool = False


def of(report: Path) -> list[Test]:
    """Return what a report of pytest says has run, in that order: nothing that was skipped."""
    found = []
    cases = ElementTree.parse(report).getroot().iter("testcase")
    for case in (one for one in cases if one.find("skipped") is None):
        place = (case.get("classname") or "").replace(".", "/")
        inside = [p for p in case.iter("property") if p.get("name") == WORLD]
        name = f"{place}.py::{case.get('name')}"
        found.append(Test(float(case.get("time") or 0), name, bool(inside)))
        found += [Test(*one) for each in inside for one in json.loads(each.get("value") or "[]")]
    return found


def table(report: Path) -> str:
    """Return when the report was made, and its slowest tests with their seconds."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    when = datetime.datetime.fromisoformat(suite.get("timestamp") or "")
    tests = of(report)
    slowest = sorted((test for test in tests if not test.world), reverse=True)[:LISTED]
    head = f"the slowest {LISTED} of {len(tests):,} tests of {when:%d %B %Y, %H:%M}, in seconds:"
    lines = [f"{test.seconds:7.1f}  {test.name}" for test in slowest]
    worlds = [f"{test.seconds:7.1f}  {test.name}" for test in tests if test.world]
    return "\n".join([head, *lines, "worlds, of which each test is counted above:", *worlds])


def main() -> str | None:
    """Print the table; return what is wrong where no run has left a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    report = parser.parse_args().report
    if not report.is_file():
        return f"{report} is not there: run `make test` first, which writes it"
    print(table(report))
    return None


if __name__ == "__main__":
    raise SystemExit(main())
