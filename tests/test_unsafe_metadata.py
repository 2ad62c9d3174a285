"""`.metadata` may name what such a file is made of: all that, and nothing that runs code."""

import copyreg
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorProperties,
)

from megalora.checkpoint.unpickle import ALLOWED, MetadataUnpickler, read_metadata

FILESYSTEM, METADATA = filesystem.__name__, metadata.__name__
code_in_a_file = pytest.mark.bad_input("code in a file")


def read(data: bytes, directory: Path) -> Metadata:
    (directory / ".metadata").write_bytes(data)
    return read_metadata(FileSystemReader(directory))


def text(value: str) -> bytes:
    """Return the opcode of a short text."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def by_stack(module: str, name: str) -> bytes:
    """Return the opcodes of protocol 4 that name something; a dotted name is followed there."""
    return text(module) + text(name) + b"\x93"


# Each makes a directory: written down to the opcode, in every way that a pickle can call.
CALLS: dict[str, Callable[[str], bytes]] = {
    "a global": lambda at: b"cos\nmkdir\n(" + text(at) + b"tR.",
    "a global from the stack": lambda at: by_stack("os", "mkdir") + text(at) + b"\x85R.",
    "an instance": lambda at: b"(" + text(at) + b"ios\nmkdir\n.",
    "an object": lambda at: b"(cos\nmkdir\n" + text(at) + b"o.",
    "a dotted name in an allowed module": lambda at: (
        by_stack(FILESYSTEM, "os.mkdir") + text(at) + b"\x85R."
    ),
    "a dotted name in an allowed class": lambda at: (
        by_stack(FILESYSTEM, "FileSystem.mkdir")
        + b"N"
        + by_stack("pathlib", "PosixPath")
        + text(at)
        + b"\x85R\x86R."
    ),
    "a method of an allowed class": lambda at: (
        by_stack("pathlib", "PosixPath.mkdir")
        + by_stack("pathlib", "PosixPath")
        + text(at)
        + b"\x85R\x85R."
    ),
    "the globals of an allowed function": lambda at: (
        by_stack("operator", "getitem")
        + by_stack("torch.serialization", "_get_layout.__globals__")
        + text("os")
        + b"\x86R"
        + b"0"
        + by_stack("os", "mkdir")
        + text(at)
        + b"\x85R."
    ),
    "evaluated text": lambda at: (
        by_stack("builtins", "eval") + text(f"__import__('os').mkdir({at!r})") + b"\x85R."
    ),
    "a state that is set by a callable": lambda at: (
        by_stack(METADATA, "StorageMeta")
        + b")R}"
        + text("__setstate__")
        + by_stack("os", "mkdir")
        + b"sb"
        + text(at)
        + b"b."
    ),
}


@code_in_a_file
@pytest.mark.parametrize("call", CALLS)
def test_no_call_gets_through(call: str, tmp_path: Path) -> None:
    at = f"/tmp/{os.getpid()}"
    data = b"\x80\x04" + CALLS[call](at)
    pickle.loads(data)
    assert Path(at).is_dir()
    Path(at).rmdir()
    with pytest.raises(ValueError, match=r"\.metadata asks for") as error:
        read(data, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not Path(at).exists()


@code_in_a_file
def test_what_others_have_registered_for_pickles_is_not_called(tmp_path: Path) -> None:
    at = f"/tmp/{os.getpid()}"
    data = b"\x80\x04\x82\xf0" + text(at) + b"\x85R."
    copyreg.add_extension("os", "mkdir", 240)
    try:
        pickle.loads(data)
        Path(at).rmdir()
        with pytest.raises(ValueError, match=r"\.metadata is damaged"):
            read(data, tmp_path)
        assert not Path(at).exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 240)


# Each changes what the process has: a class, a member of an enumeration, a function.
CHANGES: dict[str, tuple[bytes, object]] = {
    "a class": (by_stack(METADATA, "Metadata"), Metadata),
    "another class": (by_stack(METADATA, "TensorProperties"), TensorProperties),
    "a member": (
        by_stack(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R",
        metadata._MEM_FORMAT_ENCODING(0),
    ),
}


@code_in_a_file
@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_of_the_process_is_changed(changed: str, tmp_path: Path) -> None:
    opcodes, owner = CHANGES[changed]
    data = b"\x80\x04" + opcodes + b"N}" + text("stranger") + b"K\x01s\x86b."
    if changed != "another class":
        pickle.loads(data)
        assert owner.stranger == 1  # type: ignore[attr-defined]
        del owner.stranger  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="asks for 'a change of"):
        read(data, tmp_path)
    assert not hasattr(owner, "stranger")


# --- what costs memory or time, or is elsewhere ---


@pytest.mark.bad_input("work without bound")
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"a.",
        b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
    ],
    ids=["a memo of 17 GB", "bytes of a TB", "a frame of a TB", "a number of 2 GB"],
)
def test_a_number_in_a_file_takes_no_memory(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        read(data, tmp_path)


@pytest.mark.bad_input("work without bound")
def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError):
        read_metadata(FileSystemReader(tmp_path))


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("value", [None, {}, StorageMeta(), Metadata({}), "text"], ids=repr)
def test_what_is_no_metadata_is_damaged(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        read(pickle.dumps(value), tmp_path)


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "in/a/folder"])
def test_a_file_outside_of_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    stored = {"a": filesystem._StorageInfo(name, 0, 10)}
    with pytest.raises(ValueError, match=f"names '{name}', a file outside of its directory"):
        read(pickle.dumps(Metadata({}, None, stored, StorageMeta())), tmp_path)


def test_every_type_of_a_tensor_comes_back() -> None:
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for dtype in dtypes:
        properties = TensorProperties(dtype, requires_grad=True)
        assert MetadataUnpickler(pickle.dumps(properties), "file").load() == properties
    named = {name for name, value in ALLOWED.items() if isinstance(value, torch.dtype)}
    assert len(named) == len(dtypes)
