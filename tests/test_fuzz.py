"""Every reader under changed files, by hypothesis: it refuses in one line, or reads what is there.

`make test` tries a few changes of each kind of files, `make test-full` very many more.
"""

import json
from pathlib import Path

import pytest

from tests.support.forked import call
from tests.support.fuzzing import TARGETS, Target, command, fuzz, try_one
from tests.support.honest import LLAMA, write_base, write_peft
from tests.support.mutations import HARMLESS, VALUES, Mutation, apply

# Of each target; a minute in all takes about 200.
EXAMPLES = [20, pytest.param(300, marks=pytest.mark.full)]


@pytest.mark.bad_input("a malformed file")
@pytest.mark.bad_input("work without bound")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("examples", EXAMPLES)
def test_changed_files_are_refused_in_one_line_or_read(
    examples: int, target: str, tmp_path: Path
) -> None:
    failure = call(fuzz, target, tmp_path / "fuzz", examples)
    assert not failure, failure


# === In the same processes, which have Megatron ===


def _refusals_with_megatron(base: Path, adapter: Path, place: Path) -> list[str]:
    """Return what the commands that need Megatron say of a base with other sizes."""
    from megalora.launch import with_hf_flags

    command("import", adapter, "--hf-model", base, "--output", place / "run")
    (base / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 4000}))
    output = place / "never"
    readers = (
        lambda: command("import-base", "--hf-model", base, "--output", output),
        lambda: command("export", place / "run", "--hf-model", base, "--output", output),
        lambda: with_hf_flags(["--hf-model", str(base)]),
    )
    said = []
    for read in readers:
        try:
            read()
            said.append("read")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.bad_input("a malformed file")
def test_other_sizes_are_refused_where_a_model_would_be_built(
    tmp_path: Path,
) -> None:
    base, adapter = write_base(tmp_path / "base", LLAMA), write_peft(tmp_path / "adapter")
    said = call(_refusals_with_megatron, base, adapter, tmp_path)
    assert all("num_hidden_layers 4,000 (its tensors 2)" in each for each in said), said


# === The property can fail ===


def crash(_: Path) -> object:
    raise KeyError("num_layers")


def foreign_sentence(_: Path) -> object:
    return int("x")


def unnamed(_: Path) -> object:
    raise ValueError("something is wrong")


def accepts_anything(_: Path) -> object:
    return {}


@pytest.mark.parametrize("reader", [crash, unnamed, foreign_sentence])
def test_a_reader_that_crashes_or_names_nothing_is_found(reader, tmp_path: Path) -> None:
    with pytest.raises((KeyError, AssertionError)):
        try_one(reader, tmp_path / "x")


def test_a_reader_that_reads_a_harmless_change_as_something_else_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="read as something else"):
        try_one(accepts_anything, tmp_path, expected={"a": 1})


def test_a_sentence_without_an_end_is_found(tmp_path: Path) -> None:
    def long(_: Path) -> object:
        raise ValueError("config.json " + "x" * 10_000)

    # It is shown without its middle, so this one is none.
    assert len(try_one(long, tmp_path)) < 2000


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_change_changes_the_file_and_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "b": [2]}')
    assert apply(Mutation("a.json", kind), tmp_path)
    assert path.is_symlink() or path.read_bytes() != b'{"a": 1, "b": [2]}'


def test_every_value_comes_into_the_file_as_it_is(tmp_path: Path) -> None:
    for value in VALUES:
        (tmp_path / "a.json").write_text('{"a": 1}')
        apply(Mutation("a.json", "replace", 0, value), tmp_path)
        assert (tmp_path / "a.json").read_text() == '{"a": ' + value + "}"


def test_all_readers_of_strangers_files_are_tried() -> None:
    readers = {reader.__name__ for target in TARGETS.values() for reader in target.readers}
    assert {"flags", "weights", "recommend", "merge", "inspect", "importing", "rows"} < readers
    assert {"checkpoint", "finding"} < readers
    assert all(isinstance(target, Target) for target in TARGETS.values())
