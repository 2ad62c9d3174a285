"""Reading the pickles of a checkpoint without running what a stranger put into them.

torch takes a checkpoint for trusted: its reader gives `.metadata` to pickle.load and the objects in
`.distcp` files to torch.load(weights_only=False), also where Megatron believes it asked for weights
only. Here `.metadata` may name what such a file is made of and nothing else, and objects what torch
and Megatron hold for safe. `PICKLES` puts both in the place of torch's.
"""

import argparse
import errno
import io
import os
import pathlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import metadata as before_torch_2_3
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem

from megalora.replace import Patch, instead

# Reading them gives them their attributes; no other object of a file may be changed by it.
_RECORDS: tuple[type, ...] = (
    *(metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata),
    *(metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta),
    *(filesystem._StorageInfo, filesystem._StoragePrefix),
    # Megatron keeps the plans of all ranks, for --ckpt-assume-constant-structure.
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
_PROPERTIES: dict[type, Callable[..., None]] = {
    each: each.__setstate__ for each in (TensorProperties, before_torch_2_3.TensorProperties)
}
_VALUES: tuple[type, ...] = (
    *(metadata._MEM_FORMAT_ENCODING, before_torch_2_3.MEM_FORMAT_ENCODING),
    *(planner.WriteItemType, torch.Size),
)
# All that a `.metadata` may name, by module and name there.
ALLOWED: dict[tuple[str, str], object] = {
    **{(each.__module__, each.__qualname__): each for each in (*_RECORDS, *_PROPERTIES, *_VALUES)},
    **{
        ("torch", str(each).removeprefix("torch.")): each
        for each in vars(torch).values()
        if type(each) is torch.dtype
    },
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    # Where it was saved: Megatron writes a text now, and earlier this.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    # Its name in files that Python 3.13 wrote.
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
# numpy 1's name of what Megatron allows by that of numpy 2: in the random state of a rank.
_NUMPY_1 = (
    cast("Callable[..., object]", np.empty(0).__reduce__()[0]),
    "numpy.core.multiarray._reconstruct",
)
# All but those that name what this process has registered for the pickles of others.
_OPCODES = {
    opcode: load
    for opcode, load in pickle._Unpickler.dispatch.items()
    if opcode not in (pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0])
}
_ADVICE = (
    "reading a checkpoint needs no such thing and it could run code, so it was not loaded: get the "
    "checkpoint from whom you trust, saved anew by Megatron in the format torch_dist"
)


class UnsafePickle(ValueError):
    """A pickle asks for what it could run code with. Names the file and what it asks for."""


def unsafe(file: object, wanted: str) -> UnsafePickle:
    """Return the error of a file that asks for something."""
    return UnsafePickle(f"{file} asks for {wanted[:200]!r}: {_ADVICE}")


class MetadataUnpickler(pickle._Unpickler):
    """Read a `.metadata`: what is in `ALLOWED`, and plain containers.

    It is Python's own in Python, at half the speed: only there can be decided what BUILD changes
    (the one in C would set attributes of a class), and no number in a file makes it allocate.
    """

    def __init__(self, data: bytes, file: object) -> None:
        super().__init__(io.BytesIO(data))
        self.file = file
        self.stack: list[object]

    def find_class(self, module: str, name: str) -> object:
        """Return what a file names; UnsafePickle for all that it need not name."""
        if (module, name) not in ALLOWED:
            raise unsafe(self.file, f"{module}.{name}")
        return ALLOWED[module, name]

    def load_build(self) -> None:
        """Give a record that was just made its attributes."""
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) in _PROPERTIES:
            _PROPERTIES[type(made)](made, state)
        elif type(made) in _RECORDS and isinstance(state, dict):
            vars(made).update(state)
        else:
            raise unsafe(self.file, f"a change of {type(made).__name__}")

    dispatch = {**_OPCODES, pickle.BUILD[0]: load_build}  # type: ignore[assignment]  # noqa: RUF012


def read_metadata(reader: FileSystemReader, *args: object, **kwargs: object) -> Metadata:
    """Do what FileSystemReader.read_metadata does, by `MetadataUnpickler`.

    Raises ValueError where the file is damaged, asks for more, or names files elsewhere.
    """
    path = Path(reader._get_metadata_path(cast(int | None, kwargs.get("rank"))))
    if not path.is_file():
        # A device would be read for ever.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        found = MetadataUnpickler(path.read_bytes(), path).load()
        elsewhere = [each.relative_path for each in found.storage_data.values()]
        elsewhere = [name for name in elsewhere if os.path.basename(name) != name]
        found.storage_meta = getattr(found, "storage_meta", None) or StorageMeta()
        found.storage_meta.load_id = reader.load_id
    except (UnsafePickle, OSError):
        raise
    except Exception as error:  # whatever the opcodes of a damaged file lead to
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if elsewhere:
        raise ValueError(f"{path} names {elsewhere[0]!r}, a file outside of its directory")
    return found


def read_metadata_or_stop(reader: FileSystemReader, *args: object, **kwargs: object) -> Metadata:
    """Do what FileSystemReader.read_metadata does, by `unpickle.read_metadata`.

    torch would log an Exception, and go on to look for another file: CheckpointException is none.
    """
    try:
        return read_metadata(reader, *args, **kwargs)
    except ValueError as error:
        raise CheckpointException("read_metadata", {0: _wrap_exception(error)}) from error


def load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Do what DefaultLoadPlanner.load_bytes does, by `load_object`."""
    name = read_item.dest_index.fqn
    assert self.metadata is not None
    stored = self.metadata.storage_data[read_item.storage_index].relative_path
    loaded = load_object(value, f"{name!r} in {stored}")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def load_object(file: io.BytesIO | Path, name: object) -> Any:
    """Return what torch.save wrote, of classes that torch and Megatron hold for safe.

    name: of the file, for the UnsafePickle that is raised for others.
    """
    try:
        with torch.serialization.safe_globals([_NUMPY_1]):
            return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise unsafe(name, wanted(error)) from error


def check_readable(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value a checkpoint of this run could not be read with.

    A script's own flags may have values of its own classes.
    """
    if _comes_back(args):
        return
    name, value = next(each for each in vars(args).items() if not _comes_back(each[1]))
    raise ValueError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint of "
        "this run could be read with: give the flag a text or a number, or call "
        "torch.serialization.add_safe_globals for it in the script"
    )


def _comes_back(value: object) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        load_object(file, "args")
    except Exception:  # whatever a class does when it is pickled
        return False
    return True


def cause_of(error: CheckpointException) -> BaseException:
    """Return what went wrong where torch says that something did, on the first rank that says."""
    cause: BaseException = error
    while isinstance(cause, CheckpointException) and cause.failures:
        ((cause, _), *_) = cause.failures.values()
    return cause


def wanted(error: BaseException) -> str:
    """Return what torch did not load, in few words: it advises to load it all the same."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text) or re.search(r"WeightsUnpickler error: (.+)", text)
    return found[1] if found else text.strip().partition("\n")[0]


PICKLES = (
    Patch(
        FileSystemReader,
        "read_metadata",
        (),
        instead(read_metadata_or_stop),
        "the `.metadata` of a checkpoint is unpickled, and can run code",
    ),
    Patch(
        DefaultLoadPlanner,
        "load_bytes",
        ("read_item", "value"),
        instead(load_bytes),
        "objects in `.distcp` files are unpickled, and can run code",
    ),
)
