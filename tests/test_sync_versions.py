"""Versions of an adapter come whole or not at all, and only what megalora wrote goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalora.sync import VersionedDirectory
from tests.support.forked import ROOT


def fill(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_versions_are_numbered_from_one_and_the_newest_are_kept(tmp_path: Path) -> None:
    versions = VersionedDirectory(tmp_path / "a", keep=2)
    assert versions.versions() == []
    for number in (1, 2, 3, 4):
        assert versions.next_version() == number
        path = versions.write(number, fill)
        assert path == tmp_path / "a" / f"policy-v0000{number}"
        assert (path / "adapter_config.json").read_text() == "{}"
        versions.prune()
    assert names(tmp_path / "a") == ["policy-v00003", "policy-v00004"]
    # Another run goes on where the last one ended.
    assert VersionedDirectory(tmp_path / "a").next_version() == 5
    assert VersionedDirectory(tmp_path / "a", "other").next_version() == 1


@pytest.mark.bad_input("a write that fails")
def test_a_version_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device", str(folder / "adapter_model.safetensors"))

    versions = VersionedDirectory(tmp_path)
    with pytest.raises(ValueError, match=r"policy-v00001.* cannot be written: No space left"):
        versions.write(1, half)
    assert names(tmp_path) == []


@pytest.mark.bad_input("a directory that is not ours")
def test_what_others_put_among_versions_stays(tmp_path: Path) -> None:
    versions = VersionedDirectory(tmp_path, keep=1)
    versions.write(1, fill)
    (tmp_path / "policy-v00001" / "notes.txt").write_text("mine")
    (tmp_path / "policy-v00002").mkdir()
    versions.write(3, fill)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "policy-v00004").symlink_to(elsewhere)
    (tmp_path / "policy-v00005x").mkdir()
    versions.write(9, fill)
    with pytest.warns(UserWarning, match=r"notes\.txt, which megalora did not write.*it stays"):
        removed = versions.prune()
    assert removed == [tmp_path / "policy-v00003"]
    kept = ["elsewhere", "policy-v00001", "policy-v00002", "policy-v00004", "policy-v00005x"]
    assert names(tmp_path) == [*kept, "policy-v00009"]
    assert names(tmp_path / "policy-v00001") == [
        "adapter_config.json",
        "megalora.json",
        "notes.txt",
    ]
    with pytest.raises(ValueError, match="is not empty"):
        versions.write(9, fill)


def test_what_a_killed_run_left_goes_with_the_next_version(tmp_path: Path) -> None:
    # A process that ends in the middle of version 1.
    code = (
        "import os, sys; from megalora.sync import VersionedDirectory\n"
        "VersionedDirectory(sys.argv[1]).write(1, lambda folder: os._exit(3))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, env=env)
    [left] = names(tmp_path)
    assert done.returncode == 3
    assert left.startswith(".policy-v00001.megalora-new-")
    VersionedDirectory(tmp_path).write(2, fill)
    assert names(tmp_path) == ["policy-v00002"]


@pytest.mark.parametrize("name", ["", ".", "a/b", "../a", "a b", "a\n", "-v", "x" * 101])
@pytest.mark.bad_input("a malformed file")
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter name is"):
        VersionedDirectory(tmp_path, name)


@pytest.mark.bad_input("a number that is not one")
def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"):
        VersionedDirectory(tmp_path, keep=0)
