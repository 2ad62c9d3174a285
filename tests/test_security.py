"""SECURITY.md counts the bad inputs that the tests give."""

from pathlib import Path

import pytest

from tests.support import bad_inputs


def test_the_table_counts_the_bad_inputs_that_are_tried(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if not has_all_tests(request.session):
        pytest.skip("counts the tests of all files")
    counts = bad_inputs.count(request.session.items) + bad_inputs.count_in_worlds(tmp_path)
    written = bad_inputs.SECURITY.read_text()
    assert written == bad_inputs.rewritten(written, counts), "python -m tests.support.bad_inputs"
    assert all(counts[kind] for kind in bad_inputs.KINDS)


def has_all_tests(session: pytest.Session) -> bool:
    option = session.config.option
    given = {item.path for item in session.items}
    needed = (bad_inputs.ROOT / "tests").glob("test_*.py")
    marked = {path for path in needed if f"mark.{bad_inputs.MARKER}(" in path.read_text()}
    chosen = option.keyword or option.markexpr or any("::" in word for word in session.config.args)
    return marked <= given and not chosen


def test_a_kind_without_a_row_is_an_error() -> None:
    with pytest.raises(KeyError, match="comets"):
        bad_inputs.table({"comets": 1})
