"""The rules of the house, held against the source of megalora."""

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.support.house import (
    FILE_LINES,
    FUNCTION_LINES,
    RATCHETS,
    ROOMS,
    Sources,
    early_megatron,
    long_files,
    long_functions,
    room_of,
    upward_imports,
)

PACKAGE = Path(__file__).parents[1] / "megalora"

# What breaks a rule today: a line that no longer does has to go, and none may come.
UPWARD_IMPORTS: set[str] = set()
EARLY_MEGATRON: set[str] = set()

# What is longer today, with its lines, which may only fall.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS = {"mends/losses.py:counted_over_context": 41}

# So many there are today. The numbers may only fall, and must where they are more than SLACK off.
LIMITS = {
    "bare Any": 14,
    "imports in functions": 32,
    "no docstring": 0,
    "no annotation": 0,
}
SLACK = 5


@cache
def package() -> Sources:
    """Return the text of each file of megalora by its path there."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}


def check_named(found: set[str], named: set[str], rule: str) -> None:
    """Fail where something breaks a rule that is not named, or is named and does not break it."""
    assert not found - named, f"{rule}: {sorted(found - named)}"
    gone = sorted(named - found)
    assert not gone, f"{rule}: {gone} no longer: remove it from the list in {__file__}"


def check_lengths(found: dict[str, int], named: dict[str, int], limit: int) -> None:
    """Fail where something is longer than the limit and than it was, or is named and is not."""
    check_named(set(found), set(named), f"longer than {limit} lines")
    grown = {place: lines for place, lines in found.items() if lines > named[place]}
    assert not grown, f"longer than {limit} lines, and has grown: {grown}"


def check_count(found: list[str], limit: int, what: str) -> None:
    """Fail where there are more than the limit, or so few that it has to follow."""
    places = ", ".join(f"{place} {number}" for place, number in sorted(Counter(found).items()))
    assert len(found) <= limit, f"{what}: {len(found)}, not {limit} as before, in {places}"
    assert len(found) >= limit - SLACK, f"{what}: only {len(found)}: lower LIMITS[{what!r}] to it"


def test_a_room_imports_only_from_those_before_it() -> None:
    check_named(upward_imports(package()), UPWARD_IMPORTS, "imports from a room above")


def test_megatron_is_imported_only_where_the_path_says_so() -> None:
    check_named(early_megatron(package()), EARLY_MEGATRON, "imports Megatron where it must not")


def test_every_file_stands_in_a_room() -> None:
    assert {room_of(file) for file in package()} <= set(ROOMS)


def test_no_file_is_too_long() -> None:
    check_lengths(long_files(package()), LONG_FILES, FILE_LINES)


def test_no_function_is_too_long() -> None:
    check_lengths(long_functions(package()), LONG_FUNCTIONS, FUNCTION_LINES)


@pytest.mark.parametrize("what", RATCHETS)
def test_the_house_gets_no_untidier(what: str) -> None:
    check_count(RATCHETS[what](package()), LIMITS[what], what)


# === Every rule can fail ===


@pytest.mark.parametrize(
    "text",
    [
        "import megalora.hf.cli",
        "from megalora.hf import cli",
        "from megalora import hf",
        "def late():\n    from megalora.hf.cli import add_parsers",
    ],
)
def test_an_import_from_a_room_above_is_found(text: str) -> None:
    assert upward_imports({"ops/fused.py": text}) == {"ops/fused.py -> hf"}
    assert upward_imports({"launch.py": text, "hf/merge.py": text}) == set()


def test_what_is_no_room_is_the_face_of_the_plugin() -> None:
    text = "from megalora import LoRAConfig, config\nimport megalora"
    assert upward_imports({"data/build.py": text}) == {"data/build.py -> __init__"}


def test_what_only_type_checkers_read_may_point_upwards() -> None:
    text = "if TYPE_CHECKING:\n    from megalora.hf import cli"
    assert upward_imports({"ops/fused.py": text}) == set()


def test_megatron_is_found_behind_other_imports() -> None:
    sources = {
        "builder.py": "from megatron.core import parallel_state",
        "losses.py": "from megalora import builder",
        "launch.py": "import megalora.losses",
        "run.py": "def main():\n    import megatron.training\n    import megalora.launch",
        "mends/__init__.py": "try:\n    import megatron.core\nfinally:\n    pass",
        "mends/router.py": "import megatron.core",
    }
    assert early_megatron(sources) == {
        "losses.py -> builder.py",
        "launch.py -> losses.py",
        "mends/__init__.py -> megatron",
    }


def test_a_folder_runs_before_what_is_in_it() -> None:
    sources = {
        "hf/__init__.py": "import megatron.core",
        "hf/shape.py": "",
        "recommend/cli.py": "from megalora.hf.shape import ModelShape",
    }
    assert "recommend/cli.py -> hf/__init__.py" in early_megatron(sources)


def test_lengths_are_counted() -> None:
    body = "    pass\n" * FUNCTION_LINES
    sources = {"run.py": f"class Run:\n  def main():\n{body}", "launch.py": "\n" * 301}
    assert long_functions(sources) == {"run.py:Run.main": FUNCTION_LINES + 1}
    assert long_files(sources) == {"launch.py": 301}


UNTIDY = """
class Public:
    def method(self, x: Any, *, y=1, **rest) -> None:
        import torch

        def inner(z: Any): ...

    @staticmethod
    def static(x): "Said."

    def _private(self, x: int): ...
class _Private:
    def method(self): ...
"""


def test_each_untidiness_is_counted() -> None:
    found = {what: sorted(rule({"run.py": UNTIDY})) for what, rule in RATCHETS.items()}
    assert found == {
        "bare Any": ["run.py:Public.method", "run.py:Public.method.inner"],
        "imports in functions": ["run.py:Public.method"],
        "no docstring": ["run.py", "run.py:Public", "run.py:Public.method"],
        "no annotation": ["run.py:Public.method", "run.py:Public.static"],
    }


@pytest.mark.parametrize(
    ("found", "message"), [({"b"}, r"rule: \['b'\]"), (set(), r"\['a'\] no longer: remove it")]
)
def test_the_named_breaks_are_those_there_are(found: set[str], message: str) -> None:
    check_named({"a"}, {"a"}, "rule")
    with pytest.raises(AssertionError, match=message):
        check_named(found, {"a"}, "rule")


def test_what_is_too_long_may_not_grow() -> None:
    check_lengths({"a": 310}, {"a": 320}, 300)
    with pytest.raises(AssertionError, match=r"has grown: {'a': 321}"):
        check_lengths({"a": 321}, {"a": 320}, 300)


@pytest.mark.parametrize(
    ("count", "message"), [(11, "11, not 10 as before, in a 11"), (4, r"lower LIMITS\['x'\] to it")]
)
def test_a_number_may_only_fall_and_its_limit_follows(count: int, message: str) -> None:
    check_count(["a"] * 10, 10, "x")
    check_count(["a"] * (10 - SLACK), 10, "x")
    with pytest.raises(AssertionError, match=message):
        check_count(["a"] * count, 10, "x")
