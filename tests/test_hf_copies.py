"""What a merge copies beside the weights: the model's own files, and nothing else from there."""

import os
import socket
from pathlib import Path

import pytest

from megalora.hf.copies import copy_files, other_files
from megalora.hf.merge import merge_adapter
from tests.support.hf_models import hf_model, random_factors

NOT_OURS = pytest.mark.bad_input("a directory that is not ours")


def copy(source: Path) -> dict[str, str]:
    """Copy what is beside the weights; return the texts that arrive."""
    target = source.parent / "copied"
    target.mkdir()
    copy_files(other_files(source, skip=lambda name: name.endswith(".safetensors")), target)
    return {path.name: path.read_text() for path in target.iterdir() if not path.is_symlink()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("tokens")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "base"


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "4567").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    assert copy(snapshot) == {"tokenizer.json": "tokens"}
    (tmp_path / "model").symlink_to(snapshot)
    assert other_files(tmp_path / "model", lambda name: False)


def test_links_within_the_directory_are_followed(base: Path) -> None:
    (base / "vocab.json").symlink_to("tokenizer.json")
    assert copy(base) == {"tokenizer.json": "tokens", "vocab.json": "tokens"}


def test_what_is_skipped_may_lead_anywhere(base: Path) -> None:
    (base / "model.safetensors").symlink_to(base.parent / "secret")
    assert copy(base) == {"tokenizer.json": "tokens"}


def link_out(base: Path) -> None:
    (base / "merges.txt").symlink_to("../secret")


def link_out_absolutely(base: Path) -> None:
    (base / "merges.txt").symlink_to(base.parent / "secret")


def link_by_a_folder(base: Path) -> None:
    (base / "here").symlink_to("..")
    (base / "merges.txt").symlink_to("here/secret")


def link_to_false_blobs(base: Path) -> None:
    (base.parent / "blobs").mkdir()
    (base.parent / "secret").rename(base.parent / "blobs" / "secret")
    (base / "merges.txt").symlink_to("../blobs/secret")


@pytest.mark.parametrize(
    "link", [link_out, link_out_absolutely, link_by_a_folder, link_to_false_blobs]
)
@NOT_OURS
def test_a_link_that_leads_out_is_refused_by_name(base: Path, link) -> None:
    link(base)
    with pytest.raises(ValueError, match=r"merges\.txt is a link to .*secret, which is outside"):
        other_files(base, lambda name: False)


@NOT_OURS
def test_a_merge_refuses_it_before_it_writes(tmp_path: Path) -> None:
    model = hf_model("qwen3")
    model.save_pretrained(str(tmp_path / "base"))
    (tmp_path / "secret").write_text("secret")
    link_out(tmp_path / "base")
    with pytest.raises(ValueError, match=r"merges\.txt is a link"):
        merge_adapter(tmp_path / "base", random_factors(model, {"": (2, 1.0)}), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "secret"]


@NOT_OURS
def test_what_is_no_file_is_left_out(base: Path) -> None:
    os.mkfifo(base / "pipe")
    (base / "folder").mkdir()
    (base / "null").symlink_to("/dev/null")
    (base / "broken").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        server.bind("socket")
    assert copy(base) == {"tokenizer.json": "tokens"}


@NOT_OURS
def test_what_becomes_a_link_meanwhile_is_not_followed(base: Path) -> None:
    files = other_files(base, lambda name: False)
    (base / "tokenizer.json").unlink()
    link_out(base)
    (base / "merges.txt").rename(base / "tokenizer.json")
    (base.parent / "copied").mkdir()
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        copy_files(files, base.parent / "copied")


@NOT_OURS
def test_modes_and_times_are_those_of_new_files(base: Path) -> None:
    (base / "tokenizer.json").chmod(0o6777)
    os.utime(base / "tokenizer.json", (1, 1))
    copy(base)
    status = (base.parent / "copied" / "tokenizer.json").stat()
    mask = os.umask(0)
    os.umask(mask)
    assert status.st_mode & 0o7777 == 0o666 & ~mask
    assert status.st_mtime > 1
