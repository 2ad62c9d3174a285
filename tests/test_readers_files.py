"""Files that are no plain files, and JSON without bounds: refused in one sentence, soon."""

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.checkpoint import layout
from megalora.data.rows import load_rows
from megalora.hf.files import TensorFiles
from megalora.reading import MAX_DEPTH, check_plain, open_plain, parse_json, read_json
from tests.support.fuzzing import command
from tests.support.honest import LLAMA, TEXTS, write_base, write_peft, write_rows
from tests.support.soon import soon

MALFORMED = pytest.mark.bad_input("a malformed file")
UNBOUNDED = pytest.mark.bad_input("work without bound")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    # Its whole name may be longer than that of a socket can be.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def outside(path: Path) -> None:
    target = path.parents[1] / "elsewhere.json"
    target.write_text("{}")
    path.symlink_to(target)


NOT_PLAIN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a directory": (Path.mkdir, "is a directory"),
    "a pipe": (pipe, "is a pipe"),
    "a socket": (listening, "is a socket"),
    "a link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "a link to what is not there"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "a link that leads out": (outside, "leads out of its directory"),
}


def config_of_base(place: Path) -> tuple[Path, Callable[[], object]]:
    base = write_base(place / "base", LLAMA)
    return base / "config.json", lambda: command("flags", "--hf-model", base)


def weights_of_base(place: Path) -> tuple[Path, Callable[[], object]]:
    base = write_base(place / "base", LLAMA)
    return base / "model.safetensors", lambda: command("flags", "--hf-model", base)


def index_of_base(place: Path) -> tuple[Path, Callable[[], object]]:
    base = write_base(place / "base", LLAMA, shards=2)
    return base / "model.safetensors.index.json", lambda: TensorFiles(base)


def config_of_adapter(place: Path) -> tuple[Path, Callable[[], object]]:
    adapter = write_peft(place / "adapter")
    return adapter / "adapter_config.json", lambda: command("inspect", adapter)


def weights_of_adapter(place: Path) -> tuple[Path, Callable[[], object]]:
    adapter = write_peft(place / "adapter")
    return adapter / "adapter_model.safetensors", lambda: command("inspect", adapter)


def tracker(place: Path) -> tuple[Path, Callable[[], object]]:
    root = place / "run"
    (root / "iter_0000003").mkdir(parents=True)
    file = root / layout.TRACKER
    file.write_text("3")
    return file, lambda: layout.find_directory(root)


def _verifying(place: Path, name: str, text: str) -> tuple[Path, Callable[[], object]]:
    directory = place / "run" / "iter_0000003"
    directory.mkdir(parents=True)
    (directory / name).write_text(text)
    return directory / name, lambda: layout.verify(directory)


def manifest(place: Path) -> tuple[Path, Callable[[], object]]:
    return _verifying(place, "integrity.json", '{"algorithm": "sha256", "files": {}}')


def metadata(place: Path) -> tuple[Path, Callable[[], object]]:
    return _verifying(place, "metadata.json", '{"sharded_backend": "torch_dist"}')


def tensors_of_checkpoint(place: Path) -> tuple[Path, Callable[[], object]]:
    return _verifying(place, "__0_0.distcp", "tensors")


def lines(place: Path) -> tuple[Path, Callable[[], object]]:
    file = write_rows(place / "data", TEXTS) / "data.jsonl"
    return file, lambda: load_rows(str(file))


def dataset_folder(place: Path) -> tuple[Path, Callable[[], object]]:
    folder = write_rows(place / "data", TEXTS)
    return folder / "data.jsonl", lambda: load_rows(str(folder))


FILES = (
    *(config_of_base, weights_of_base, index_of_base, config_of_adapter, weights_of_adapter),
    *(tracker, manifest, metadata, tensors_of_checkpoint, lines, dataset_folder),
)
# Of what the user names, and of what is verified by its content, a link may lead anywhere.
LINKS_ALLOWED = (lines, dataset_folder, tensors_of_checkpoint)


CASES = [
    (file, what)
    for file in FILES
    for what in NOT_PLAIN
    # A directory of such a name is a folder of data.
    if not (what == "a link that leads out" and file in LINKS_ALLOWED)
    and (file, what) != (lines, "a directory")
]


@MALFORMED
@pytest.mark.parametrize(("file", "what"), CASES)
def test_only_plain_files_are_opened(
    tmp_path: Path, file: Callable[[Path], tuple[Path, Callable[[], object]]], what: str
) -> None:
    path, read = file(tmp_path)
    read()
    make, sentence = NOT_PLAIN[what]
    path.unlink()
    make(path)
    with soon(), pytest.raises(ValueError, match=path.name) as caught:
        read()
    assert sentence in str(caught.value)


@UNBOUNDED
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_a_terabyte_is_not_read(
    tmp_path: Path, file: Callable[[Path], tuple[Path, Callable[[], object]]]
) -> None:
    path, read = file(tmp_path)
    sparse(path)
    with soon(), pytest.raises(ValueError, match=path.name):
        read()


def test_links_of_the_hub_cache_and_inside_the_directory_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    base, adapter = write_base(snapshot, LLAMA), write_peft(snapshot / "adapter")
    said = command("flags", "--hf-model", base), command("inspect", adapter)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in [*base.iterdir(), *adapter.iterdir()]:
        if file.is_file():
            blob = file.rename(blobs / f"{file.parent.name}-{file.name}")
            file.symlink_to(os.path.relpath(blob, file.parent))
    assert (command("flags", "--hf-model", base), command("inspect", adapter)) == said
    inside = (base / "config.json").readlink()
    (base / "config.json").unlink()
    (base / "real.json").write_bytes((base / inside).read_bytes())
    (base / "config.json").symlink_to("real.json")
    assert command("flags", "--hf-model", base) == said[0]


def test_a_link_to_the_blobs_of_another_model_leads_out(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "a" / "snapshots" / "0", tmp_path / "b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../b/blobs/x")
    with pytest.raises(ValueError, match="leads out of its directory"):
        read_json(snapshot / "config.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"config.json cannot be read \(Permission denied\)"):
        open_plain(path)


@MALFORMED
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud800"}', "one half of a character"),
        (b"[]", "holds a JSON list"),
        (b"1", "holds a JSON int"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a": ' + b"9" * 301 + b"}", "a number of 301 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "digits"),
        (b"\x00" * 100, "Expecting value"),
    ],
)
def test_what_is_no_json_object_is_refused_by_file_and_reason(
    tmp_path: Path, text: bytes, sentence: str
) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_json(tmp_path / "config.json")
    assert sentence in str(caught.value)


@UNBOUNDED
@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'["' + b'\\"' * 1_000_000,
        b'{"a": "' + b"[" * 100,
    ],
)
def test_deep_and_unclosed_json_is_refused_soon(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with soon(), pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read_json(tmp_path / "config.json")


def test_brackets_in_texts_are_no_depth() -> None:
    value = {"text": "[" * 200 + '\\"{' * 50, "a": [[1]]}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json('\ufeff"\\ud83d\\ude00"') == "😀"


@MALFORMED
@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": 1},
        {"__metadata__": {"format": 1}},
        {"a" * 1001: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        [],
    ],
)
def test_headers_that_lie_are_refused_in_one_sentence(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TensorFiles(tmp_path)


@UNBOUNDED
@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused_soon(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with soon(), pytest.raises(ValueError, match=r"model\.safetensors"):
        command("flags", "--hf-model", write_config(tmp_path))


def write_config(directory: Path) -> Path:
    (directory / "config.json").write_text(json.dumps({**LLAMA, "rope_scaling": None}))
    return directory


@UNBOUNDED
def test_an_index_of_many_tensors_is_compared_in_linear_time(tmp_path: Path) -> None:
    header = {
        str(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)
    }
    text = json.dumps(header).encode()
    (tmp_path / "model-1.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    index = {"weight_map": dict.fromkeys(header, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with soon():
        assert len(TensorFiles(tmp_path).files) == len(header)


@MALFORMED
@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {}, {"x": None}, {"x": 1}, {"x": ["a.safetensors"]}, {"x": ""}]
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        TensorFiles(tmp_path)


@MALFORMED
@pytest.mark.parametrize(
    "files",
    [
        {"../x": "0"},
        {"/dev/zero": "0"},
        {"": "0"},
        {".": "0"},
        {"..": "0"},
        {"x": 1},
        {"x": None},
        {"x" * 300: "0"},
        {"x\x00": "0"},
        ["x"],
        None,
    ],
)
def test_a_manifest_of_no_files_of_its_directory_is_damage(tmp_path: Path, files: object) -> None:
    (tmp_path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    assert len(layout.find_damage(tmp_path)) == 1


@UNBOUNDED
def test_a_manifest_of_very_many_names_is_told_in_a_few(tmp_path: Path) -> None:
    names = {f"{n}\x1b[31m": "0" for n in range(50_000)}
    text = json.dumps({"algorithm": "sha256", "files": names})
    (tmp_path / "integrity.json").write_text(text)
    with soon():
        found = layout.find_damage(tmp_path)
    assert len(found) == 6
    assert found[-1] == "and 49995 more"


@UNBOUNDED
def test_a_terabyte_of_holes_is_not_summed(tmp_path: Path) -> None:
    sparse(tmp_path / "__0_0.distcp")
    text = json.dumps({"algorithm": "sha256", "files": {"__0_0.distcp": "0"}})
    (tmp_path / "integrity.json").write_text(text)
    with soon():
        assert "bytes of nothing" in layout.find_damage(tmp_path)[0]


@MALFORMED
def test_a_manifest_that_names_a_device_by_a_link_does_not_read_it(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    text = json.dumps({"algorithm": "sha256", "files": {"x": "0"}})
    (tmp_path / "integrity.json").write_text(text)
    with soon():
        assert "is a device" in layout.find_damage(tmp_path)[0]


@UNBOUNDED
@pytest.mark.parametrize("text", ["9" * 19, "9" * 10_000, "0" * 10**7])
def test_a_tracker_file_of_many_digits_is_a_defect(tmp_path: Path, text: str) -> None:
    (tmp_path / layout.TRACKER).write_text(text)
    with soon():
        assert "instead of an iteration" in str(layout.read_tracker(tmp_path).defect)


def test_a_plain_file_is_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    check_plain(tmp_path / "x", inside=tmp_path)
    with pytest.raises(FileNotFoundError):
        check_plain(tmp_path / "y", inside=tmp_path)
