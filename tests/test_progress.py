"""Long work says how far it is: on a terminal in one line, in a log now and then."""

import io
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megalora import progress
from megalora.data import preferences, prompts
from megalora.data.tokenizers import ByteTokenizer, encoder_for
from megalora.progress import Progress


class Terminal(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        """Say that it is one."""
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speak after hundredths of a second."""
    monkeypatch.setattr(progress, "_TERMINAL", (0.02, 0.01))
    monkeypatch.setattr(progress, "_LOG", (0.02, 0.05))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(progress.QUIET, raising=False)


def work(out: io.StringIO, seconds: float = 0.09) -> str:
    """Return what is said of work that has done 3 of 12 things when it is first asked."""
    with Progress("loading", 12, "tensors", out=out) as loading:
        for name in "abc":
            loading.add(name)
        time.sleep(seconds)
    return out.getvalue()


def test_a_log_has_a_line_now_and_then() -> None:
    lines = work(io.StringIO()).splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("megalora: loading: 3 of 12 tensors (25%), 0 s, about ")


def test_a_terminal_has_one_line_that_is_gone_in_the_end() -> None:
    said = work(Terminal())
    assert "\n" not in said
    assert said.startswith("\rmegalora: loading: 3 of 12 tensors")
    assert said.endswith("\r\033[K")
    assert said.count("\r") > 2


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_short_work_says_nothing(out: io.StringIO) -> None:
    assert work(out, seconds=0) == ""


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), (progress.QUIET, "0")])
def test_other_ranks_and_who_wants_no_progress_hear_nothing(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert work(io.StringIO()) == ""


def test_it_ends_with_the_work_that_fails() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Progress("loading", out=out) as loading:
        raise ValueError("broken")
    assert loading._thread
    assert not loading._thread.is_alive()


@pytest.mark.parametrize(
    ("total", "done", "line"),
    [
        (None, 0, "megalora: loading, 8 s"),
        (None, 5, "megalora: loading: 5 tensors, 8 s"),
        (20, 5, "megalora: loading: 5 of 20 tensors (25%), 8 s, about 24 s left"),
        (20, 20, "megalora: loading: 20 of 20 tensors (100%), 8 s"),
    ],
)
def test_what_is_known_is_said(total: int | None, done: int, line: str) -> None:
    loading = Progress("loading", total, "tensors")
    for _ in range(done):
        loading.add()
    assert loading.line(8.0) == line


class Noted(Progress):
    """What was said to be done, and how much of how much was."""

    notes: ClassVar[list[tuple[str, int, int | None]]] = []

    def __exit__(self, *error: Any) -> None:
        """Note it."""
        super().__exit__(*error)
        self.notes.append((self.what, self.done, self.total))


def test_long_data_of_every_kind_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Preferences, and prompts of reinforcement learning: both are encoded whole at the start."""
    monkeypatch.setattr(Noted, "notes", [])
    monkeypatch.setattr(preferences, "Progress", Noted)
    monkeypatch.setattr(prompts, "Progress", Noted)
    rows = [
        {"prompt": f"Who is {n}?", "chosen": " I.", "rejected": " You.", "answer": n}
        for n in range(10)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, encoder = str(tmp_path / "rows.jsonl"), encoder_for(ByteTokenizer())
    preferences.load_preferences(dataset, encoder, 64, valid_fraction=0.2)
    prompts.load_prompts(dataset, encoder, max_length=64, seed=0)
    assert Noted.notes == [
        ("encoding the train pairs", 8, 8),
        ("encoding the valid pairs", 2, 2),
        ("encoding the prompts", 10, 10),
    ]
