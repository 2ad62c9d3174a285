"""The embedded corpora: real text of this machine, reproducible, without leaks."""

import os
import random
import sys
from pathlib import Path

import pytest

from megalora.data import corpus

type Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def corpora() -> tuple[Rows, Rows]:
    """Return both corpora by split, from one reading of the library."""
    modules = list(corpus.read_modules(Path(os.__file__).parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "read_modules", lambda root: modules)
        texts = {split: corpus.text_rows(split) for split in corpus.SPLITS}
        return texts, {split: corpus.docstring_rows(split) for split in corpus.SPLITS}


@pytest.fixture(scope="module")
def texts(corpora: tuple[Rows, Rows]) -> Rows:
    return corpora[0]


@pytest.fixture(scope="module")
def questions(corpora: tuple[Rows, Rows]) -> Rows:
    return corpora[1]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text(
        '"""Shapes of all kinds, drawn by hand."""\n'
        "class Circle:\n"
        '    """A round shape that\n    rolls away.\n\n    More on it.\n    """\n'
        "    def area(self):\n"
        '        """Return the area in square metres."""\n'
        "        return 3\n"
        "    def _secret(self):\n"
        '        """Return what nobody may know."""\n'
        "def twin():\n"
        '    """Return the AREA in square metres"""\n'
        "def short():\n"
        '    """Too short."""\n'
    )
    (tmp_path / "_hidden.py").write_text('def f():\n    """Return a hidden value of sorts."""\n')
    (tmp_path / "broken.py").write_text("print 'Python 2'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text(
        'def f():\n    """Return what a test returns."""\n'
    )
    return tmp_path


def test_both_corpora_are_of_a_useful_size(texts: Rows, questions: Rows) -> None:
    assert sum(len(row["text"]) for row in texts["train"]) > 5_000_000
    assert sum(len(row["text"]) for row in texts["validation"]) > 20_000
    assert len(questions["train"]) > 2_000
    assert len(questions["validation"]) > 200


def test_a_question_asks_for_the_first_paragraph_of_a_docstring(questions: Rows) -> None:
    rows = questions["train"] + questions["validation"]
    asked = [row for row in rows if row["prompt"] == "What does textwrap.dedent do?\n"]
    assert [row["completion"] for row in asked] == [
        "Remove any common leading whitespace from every line in `text`."
    ]


def test_answers_fit_short_sequences(questions: Rows) -> None:
    for row in questions["train"] + questions["validation"]:
        assert 20 <= len(row["completion"].encode()) <= 200


def test_no_answer_and_no_question_is_on_both_sides(questions: Rows) -> None:
    rows = questions["train"] + questions["validation"]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert len({row["completion"].casefold() for row in rows}) == len(rows)


def test_held_out_answers_are_cut_out_of_the_pretraining_text(texts: Rows, questions: Rows) -> None:
    rows = texts["train"] + texts["validation"]
    text = "\n".join(" ".join(row["text"].split()).casefold() for row in rows)

    def share(split: str) -> float:
        answers = [row["completion"].casefold().rstrip(".") for row in questions[split]]
        sample = random.Random(0).sample(answers, 200)
        return sum(answer in text for answer in sample) / len(sample)

    # The rest are comments and longer sentences that happen to hold the same words.
    assert share("validation") < 0.06
    assert share("train") > 0.9


def test_the_language_reference_is_part_of_the_text(texts: Rows) -> None:
    rows = texts["train"] + texts["validation"]
    assert any(row["text"].startswith('The "if" statement') for row in rows)


def test_reading_again_gives_the_same_and_imports_nothing(questions: Rows) -> None:
    before = set(sys.modules)
    rows = corpus.docstring_rows("train", Path(os.__file__).parent)
    assert rows == questions["train"]
    assert not {"antigravity", "this", "turtle"} & (set(sys.modules) - before)


def test_both_splits_are_of_one_reading(questions: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds at the start of each process."""
    assert corpus.docstring_rows("train") == questions["train"]
    monkeypatch.setattr(corpus, "read_modules", pytest.fail)
    assert corpus.docstring_rows("validation") == questions["validation"]


def test_the_same_files_give_the_same_rows_in_the_same_order(library: Path) -> None:
    found = corpus.questions(corpus.read_modules(library))
    assert [docstring.name for docstring in found] == ["shapes.Circle", "shapes.Circle.area"]
    assert found[0].answer == "A round shape that rolls away."
    assert found == corpus.questions(corpus.read_modules(library))


def test_private_tested_twin_and_broken_definitions_are_left_out(library: Path) -> None:
    rows = corpus.docstring_rows("train", library) + corpus.docstring_rows("validation", library)
    assert sorted(row["prompt"] for row in rows) == [
        "What does shapes.Circle.area do?\n",
        "What is shapes.Circle?\n",
    ]


def test_a_held_out_docstring_is_cut_wherever_it_stands(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_is_held_out", lambda name, kind: name == "shapes.Circle.area")
    (row,) = [row for row in corpus.text_rows("train", library) if "Circle" in row["text"]]
    assert "square metres" not in row["text"]
    assert "rolls away" in row["text"]
    assert "return 3" in row["text"]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset_split 'test' is not a split .* use \('train'"):
        corpus.text_rows("test")


def test_a_python_without_its_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no Python files: install"):
        corpus.docstring_rows("train", tmp_path)
