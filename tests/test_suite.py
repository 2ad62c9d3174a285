"""How `make test` is cut, what it leaves to `make test-full`, and what `make test-slow` lists."""

from pathlib import Path

import pytest

from tests.support import durations
from tests.support.forked import ROOT, call
from tests.support.parts import in_part, parts

MADE = """
import json, time
import pytest

def test_quick():
    pass

@pytest.mark.skip
def test_skipped():
    pass

def test_slow():
    time.sleep(0.3)

@pytest.fixture
def prepared():
    time.sleep(0.2)

def test_behind_a_slow_fixture(prepared):
    pass

def test_a_world(record_property):
    time.sleep(0.5)
    record_property("tests of a world", json.dumps([[0.25, "inside.py::test_of_ranks"]]))
"""


def run(arguments: list[str], said: Path) -> int:
    """Run pytest, in a process that has nothing of this run; what it says goes to a file."""
    import contextlib

    with said.open("w") as file, contextlib.redirect_stdout(file):
        return int(pytest.main(arguments))


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_test_of_a_world_is_in_one_part(world_size: int, workers: int) -> None:
    tests = list(range(50))
    found = [in_part(tests, part, last=[17]) for part in parts(world_size, workers)]
    assert sorted(test for part in found for test in part[:-1]) == [*range(17), *range(18, 50)]
    assert all(part[-1] == 17 for part in found), "what looks back does so in every part"
    assert len({len(part) // 2 for part in found}) <= 2, "parts of one size"


def test_a_world_is_whole_on_two_cores_and_cut_on_more() -> None:
    assert [len(parts(size, workers=2)) for size in (1, 2, 4)] == [1, 1, 1]
    assert [len(parts(size, workers=8)) for size in (1, 2, 4)] == [2, 4, 2]


def test_the_slowest_tests_are_listed_with_those_inside_worlds(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    (tmp_path / "test_made.py").write_text(MADE)
    words = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junitxml={report}"]
    assert call(run, [*words, str(tmp_path / "test_made.py")], tmp_path / "said.txt") == 0
    head, *lines = durations.table(report).splitlines()
    assert head.startswith("the slowest 20 of 5 tests of ")
    names = [line.split("::")[1] for line in lines[:4]]
    slow = ["test_slow", "test_of_ranks", "test_behind_a_slow_fixture", "test_quick"]
    assert names == slow, "a world counts by its tests"
    assert lines[4].startswith("worlds")
    assert "test_a_world" in lines[5]


def test_without_a_run_there_is_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["durations", str(tmp_path / "none.xml")])
    assert "run `make test` first" in (durations.main() or "")


@pytest.mark.parametrize(
    ("more", "ids"), [([], ["[three]"]), (["-m", "full"], ["[ten]"])], ids=["test", "test-full"]
)
def test_more_of_the_same_is_left_to_the_full_run(
    more: list[str], ids: list[str], tmp_path: Path
) -> None:
    words = [str(ROOT / "tests/test_checkpoint_faults.py"), "-k", "kills", "--collect-only", "-q"]
    words = [*words, *more, "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    assert call(run, words, tmp_path / "said.txt") == 0
    found = [line for line in (tmp_path / "said.txt").read_text().splitlines() if "::" in line]
    assert [line[line.index("[") :] for line in found] == ids
