"""A directory of checkpoints: its tracker file, its iterations, and its manifest of checksums."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from megalora.checkpoint import layout
from megalora.checkpoint.layout import RELEASE, TRACKER, Tracker

DATA = b"tensors"


def write_manifest(directory: Path, digests: dict[str, str]) -> None:
    text = json.dumps({"algorithm": "sha256", "files": digests}, indent=2)
    (directory / "integrity.json").write_text(text)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one file, with a manifest as Megatron writes it."""
    directory = tmp_path / "run" / "iter_0000003"
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(DATA)
    write_manifest(directory, {"__0_0.distcp": hashlib.sha256(DATA).hexdigest()})
    return directory


@pytest.mark.parametrize(
    ("text", "newest"), [("3", 3), ("0\n", 0), ("0000012", 12), ("release\n", RELEASE)]
)
def test_a_tracker_file_names_an_iteration_or_a_release(
    tmp_path: Path, text: str, newest: layout.Iteration
) -> None:
    (tmp_path / TRACKER).write_text(text)
    assert layout.read_tracker(tmp_path) == Tracker(newest)


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("text", ["", "\x00\x00", "-3", "+3", "3_0", "٣", "Release", "3x"])
def test_whatever_else_a_tracker_file_holds_is_a_defect(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    newest, defect = layout.read_tracker(tmp_path).newest, layout.read_tracker(tmp_path).defect
    assert newest is None
    assert f"{tmp_path / TRACKER} holds" in str(defect)


def test_without_a_tracker_file_nothing_is_the_newest(tmp_path: Path) -> None:
    assert layout.read_tracker(tmp_path) == Tracker(None)
    assert layout.read_iteration(tmp_path) is None


def test_a_tracker_file_is_written_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.write_tracker(tmp_path, 3)

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        layout.write_tracker(tmp_path, 6)
    assert (tmp_path / TRACKER).read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]


def test_checkpoints_are_listed_newest_first_and_a_release_last(tmp_path: Path) -> None:
    for name in ("iter_0000003", "release", "iter_0000010", "iter_4", "iter_best"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000020").touch()
    assert layout.list_iterations(tmp_path) == [10, 3, RELEASE]


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", r"txt holds 'x' instead of an iteration or 'release': write 3 into it"),
        ("", r"txt holds '' instead of .*: write 3 into it"),
        ("7", r"txt names iter_0000007, which is missing: write 3 into it"),
        ("release", r"txt names release, which is missing: write 3 into it"),
        (None, r"run has no latest_checkpointed_iteration.txt: write 3 into it"),
    ],
)
def test_a_tracker_file_that_leads_nowhere_says_what_to_write(
    checkpoint: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (checkpoint.parent / TRACKER).write_text(text)
    with pytest.raises(ValueError, match=message):
        layout.find_directory(checkpoint.parent)


def test_a_directory_of_checkpoints_and_that_of_one_lead_to_the_same(checkpoint: Path) -> None:
    (checkpoint.parent / TRACKER).write_text("3")
    assert layout.find_directory(checkpoint.parent) == checkpoint
    assert layout.find_directory(checkpoint) == checkpoint


@pytest.mark.bad_input("a malformed file")
def test_every_flipped_bit_of_every_file_is_seen(checkpoint: Path) -> None:
    layout.verify(checkpoint)
    for file in checkpoint.iterdir():
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            found = ", ".join(layout.find_damage(checkpoint))
            assert file.name in found, f"bit {bit}: {found}"
        file.write_bytes(whole)
    layout.verify(checkpoint)


@pytest.mark.bad_input("a malformed file")
def test_damage_is_named_with_what_else_could_be_used(checkpoint: Path) -> None:
    (checkpoint.parent / "iter_0000001").mkdir()
    (checkpoint / "__0_0.distcp").unlink()
    (checkpoint / "__1_0.distcp").touch()
    message = (
        r"iter_0000003 is damaged: __0_0.distcp is missing, __1_0.distcp is not in integrity.json: "
        r"copy it again .* or use another \(iter_0000001\)"
    )
    with pytest.raises(ValueError, match=message):
        layout.verify(checkpoint)


def test_a_note_beside_the_files_is_no_damage(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("the good one")
    (checkpoint / ".nfs0001").touch()
    assert layout.find_damage(checkpoint) == []


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("name", ["../outside", "/dev/zero"])
def test_a_manifest_of_files_elsewhere_is_refused_unread(checkpoint: Path, name: str) -> None:
    write_manifest(checkpoint, {name: "0" * 64})
    assert "integrity.json is damaged" in ", ".join(layout.find_damage(checkpoint))


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"algorithm": "sha256", "files": 3}', "[" * 9999]
)
def test_json_that_is_no_manifest_is_damage(checkpoint: Path, manifest: str) -> None:
    (checkpoint / "integrity.json").write_text(manifest)
    assert "integrity.json is damaged" in ", ".join(layout.find_damage(checkpoint))


def test_without_a_manifest_nothing_is_claimed(checkpoint: Path) -> None:
    (checkpoint / "integrity.json").unlink()
    (checkpoint / "__0_0.distcp").write_bytes(b"other")
    layout.verify(checkpoint)
    assert not layout.has_manifest(checkpoint)
