"""Directories that are written: whole or not at all, over nothing that megalora did not write."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.__main__ import main
from megalora.checkpoint.owner import Owner
from megalora.hf import directories
from megalora.hf.directories import relation_of, whole_directory
from megalora.hf.written import MANIFEST

NOT_OURS = pytest.mark.bad_input("a directory that is not ours")


def write(target: Path, text: str = "new", *, overwrite: bool = True) -> None:
    with whole_directory(target, overwrite=overwrite) as directory:
        (directory / "a.txt").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "b.txt").write_text(text)


def contents(directory: Path) -> dict[str, object]:
    """Return all that is in a directory: files' bytes, what links lead to."""
    return {
        str(path.relative_to(directory)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.lstat().st_mode
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    write(tmp_path / "ours", "old")
    return tmp_path / "ours"


def test_an_earlier_output_is_replaced_whole(ours: Path) -> None:
    with whole_directory(ours, overwrite=True) as directory:
        (directory / "c.txt").write_text("other")
        assert (ours / "a.txt").read_text() == "old", "until the new one is complete"
    assert sorted(contents(ours)) == ["c.txt", MANIFEST]
    assert os.listdir(ours.parent) == ["ours"]


# === What is not ours is refused, and stays ===


def change(directory: Path) -> None:
    (directory / "a.txt").write_text("longer")


def link_a_file(directory: Path) -> None:
    (directory / "a.txt").unlink()
    (directory.parent / "elsewhere").write_text("old")
    (directory / "a.txt").symlink_to(directory.parent / "elsewhere")


def link_a_folder(directory: Path) -> None:
    (directory / "sub").rename(directory.parent / "elsewhere")
    (directory / "sub").symlink_to(directory.parent / "elsewhere")


def lead_out(directory: Path) -> None:
    (directory.parent / "victim").write_text("old")
    files = {"../victim": 3, "a.txt": 3, "sub/b.txt": 3}
    (directory / MANIFEST).write_text(json.dumps({"version": 1, "files": files}))


def put_manifest(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / MANIFEST).write_text(text)


def put_pipe(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    os.mkfifo(directory / MANIFEST)


NO_MANIFEST = f"a.txt, {MANIFEST}, sub"
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes beside": (lambda d: (d / "notes.txt").write_text("mine"), "notes.txt"),
    "notes below": (lambda d: (d / "sub" / "notes.txt").write_text("mine"), "sub/notes.txt"),
    "an empty folder": (lambda d: (d / "runs").mkdir(), "runs"),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe"),
    "a changed file": (change, "a.txt (of another size)"),
    "a link for a file": (link_a_file, "a.txt"),
    "a link for a folder": (link_a_folder, "sub"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "a.txt, sub"),
    "many files": (lambda d: [(d / f"{i}").touch() for i in range(9)], "0, 1, 2 and more"),
    "a name with a line break": (lambda d: (d / "x\nerror: y").touch(), r"x\nerror: y"),
    "a manifest that leads out": (lead_out, NO_MANIFEST),
    "a manifest that is a pipe": (put_pipe, NO_MANIFEST),
    "a manifest of another kind": (put_manifest("[1]"), NO_MANIFEST),
    "a manifest of a later version": (put_manifest('{"version": 2, "files": {}}'), NO_MANIFEST),
    "a manifest without files": (put_manifest('{"version": 1}'), NO_MANIFEST),
    "a deep manifest": (put_manifest("[" * 100_000), NO_MANIFEST),
    "a torn manifest": (put_manifest('{"version": 1, "fil'), NO_MANIFEST),
}


@pytest.mark.parametrize("case", FOREIGN)
@NOT_OURS
def test_what_megalora_did_not_write_is_named_and_stays(ours: Path, case: str) -> None:
    make, named = FOREIGN[case]
    make(ours)
    before = contents(ours.parent)
    with pytest.raises(ValueError, match="which megalora did not write") as refused:
        write(ours)
    assert f"holds {named}, which" in str(refused.value)
    assert contents(ours.parent) == before


@NOT_OURS
def test_what_comes_while_the_new_one_is_made_stays(ours: Path) -> None:
    before = contents(ours)

    def write_slowly() -> None:
        with whole_directory(ours, overwrite=True):
            (ours / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        write_slowly()
    assert contents(ours) == {**before, "notes.txt": b"mine"}
    assert os.listdir(ours.parent) == ["ours"]


@NOT_OURS
def test_what_comes_in_the_last_moment_is_kept_and_named(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = directories.remove_written

    def add_and_remove(old: Path, written: dict[str, int]) -> bool:
        (old / "sub" / "notes.txt").write_text("mine")
        return remove(old, written)

    monkeypatch.setattr(directories, "remove_written", add_and_remove)
    with pytest.warns(UserWarning, match="has files that came into"):
        write(ours)
    (old,) = (path for path in ours.parent.iterdir() if path != ours)
    assert contents(old).keys() == {"sub", "sub/notes.txt"}
    assert (ours / "a.txt").read_text() == "new"


@NOT_OURS
def test_without_overwrite_nothing_is_replaced(ours: Path) -> None:
    with pytest.raises(ValueError, match="is not empty: give another directory or --overwrite"):
        write(ours, overwrite=False)
    assert (ours / "a.txt").read_text() == "old"


# === Places ===


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is read, with all its relatives."""
    (tmp_path / "above" / "run" / "below").mkdir(parents=True)
    (tmp_path / "above" / "run" / "file").write_text("read")
    (tmp_path / "link").symlink_to(tmp_path / "above" / "run")
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "above" / "run"


PLACES = {
    "{run}": "is also",
    "{run}/": "is also",
    "{run}/below/..": "is also",
    "../link": "is also",
    "{run}/below": "is inside",
    "{run}/below/new": "is inside",
    "../link/new": "is inside",
    "{run}/..": "is above",
    "../home": "is your home directory",
    "~": "is your home directory",
    ".": "is the working directory",
    "/": "is the root of the file system",
    "/proc": "is a mount point",
    "{run}/file": "is a file",
    "{run}/file/new": "file, which is a file",
}


@pytest.mark.parametrize("place", PLACES)
@NOT_OURS
def test_no_command_writes_where_it_reads_or_into_a_place_of_others(
    run: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = os.path.expanduser(place.format(run=run))
    before = contents(run.parents[1])
    for command in (
        ["export", str(run)],
        ["import", str(run), "--hf-model", "nowhere"],
        ["merge", "nowhere", "--hf-model", str(run)],
        ["import-base", "--hf-model", str(run)],
    ):
        assert main([*command, "--output", output, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: output {output!r} is ")
        assert PLACES[place] in said
        assert said.count("\n") == 1
    assert contents(run.parents[1]) == before


MOUNTED = """
import os, subprocess, sys
from megalora.hf.directories import relation_of
user = os.geteuid()
try:
    os.unshare(os.CLONE_NEWNS | (os.CLONE_NEWUSER if user else 0))
    subprocess.run(["mount", "--bind", sys.argv[1], sys.argv[2]], check=True)
except (OSError, subprocess.CalledProcessError):
    sys.exit("no mounts")
print(relation_of(sys.argv[1], sys.argv[2]), relation_of(sys.argv[2] + "/new", sys.argv[1]))
"""


@NOT_OURS
def test_a_directory_mounted_twice_is_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    words = [sys.executable, "-c", MOUNTED, str(run), str(tmp_path / "mounted")]
    root = Path(__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    if "no mounts" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.split() == ["also", "inside"], done.stderr


def test_directories_side_by_side_do_not_touch(run: Path) -> None:
    for other in ("run2", "below", "ru"):
        assert relation_of(run.parent / other, run) == ""


def test_a_link_stays_and_what_it_names_is_written(ours: Path) -> None:
    (ours.parent / "links").mkdir()
    link = ours.parent / "links" / "out"
    link.symlink_to(ours)
    write(link)
    assert os.readlink(link) == str(ours)
    assert os.listdir(link.parent) == ["out"]
    assert (ours / "a.txt").read_text() == "new"
    assert sorted(os.listdir(ours.parent)) == ["links", "ours"]


@pytest.mark.parametrize("to", ["nowhere", "out"])
@NOT_OURS
def test_a_link_to_nothing_is_named(tmp_path: Path, to: str) -> None:
    (tmp_path / "out").symlink_to(to)
    with pytest.raises(ValueError, match=r"out' is a link to .*, which does not exist"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


# === What a killed run leaves ===


def hidden(target: Path, what: str, owner: Owner) -> Path:
    mark = f"{what}-{owner.machine}-{owner.pid}-{owner.start}-0123abcd"
    return target.with_name(f".{target.name}.megalora-{mark}")


def test_only_what_a_dead_run_left_is_removed(tmp_path: Path) -> None:
    this = Owner.this()
    dead = Owner(this.machine, this.pid, this.start - 1)
    others = [
        hidden(tmp_path / "out", "new", this),
        hidden(tmp_path / "out", "new", Owner("0123456789ab", 1, 1)),
        hidden(tmp_path / "outer", "new", dead),
        tmp_path / ".out.megalora-new",
    ]
    for path in (*others, hidden(tmp_path / "out", "new", dead)):
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "half").write_text("half")
    write(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "out"])


def test_what_a_dead_run_moved_aside_is_put_back(ours: Path) -> None:
    this, before = Owner.this(), contents(ours)
    ours.rename(hidden(ours, "old", Owner(this.machine, this.pid, this.start - 1)))
    with pytest.raises(ValueError, match="is not empty"):
        write(ours, overwrite=False)
    assert contents(ours) == before
    assert os.listdir(ours.parent) == ["ours"]


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def record_fsync(file: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def record_rename(source: Path, target: Path) -> None:
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    write(tmp_path / "out")
    before = events[: events.index("renamed")]
    assert {"a.txt", "sub", "b.txt", MANIFEST} < set(before)
    assert before[-1].startswith(".out.megalora-new")
    assert events[events.index("renamed") + 1 :] == [tmp_path.name]
