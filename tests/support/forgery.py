"""Checkpoints that a stranger has forged: a payload in one of their files, all else as it was."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata


class Payload:
    """Writes a marker where it is unpickled. Picklable as an optimizer's or a run's value."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        """Have the file made that tells."""
        return open, (str(self.marker), "w")


def runs(data: bytes, marker: Path) -> bool:
    """Say whether a pickle writes its marker where it is plainly read; remove the marker."""
    if data.startswith(b"PK"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)
    written = marker.exists()
    marker.unlink(missing_ok=True)
    return written


def objects(checkpoint: Path) -> list[str]:
    """Return the keys of what a checkpoint holds beside tensors, each of one kind."""
    stored = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    keys = sorted(key for key, entry in stored.items() if isinstance(entry, BytesStorageMetadata))
    return list({key.partition("/")[0]: key for key in keys}.values())


def forge(checkpoint: Path, place: str, value: object) -> bytes:
    """Put a value into a checkpoint's own directory; return the bytes that a reader unpickles.

    place: `.metadata`, `common.pt`, `mp_rank_00/model_optim_rng.pt`, or the key of an object.
    """
    (checkpoint / "integrity.json").unlink(missing_ok=True)
    if place == ".metadata":
        metadata = pickle.loads((checkpoint / place).read_bytes())
        metadata.planner_data = value
        data = pickle.dumps(metadata)
        (checkpoint / place).write_bytes(data)
    elif place.endswith(".pt"):
        data = _saved({"iteration": 1, "more": value})
        (checkpoint / place).write_bytes(data)
    else:
        data = _saved([value])
        _replace_object(checkpoint, place, data)
    return data


def set_flag(checkpoint: Path, name: str, value: object) -> None:
    """Let a checkpoint say that its run had another value of a flag."""
    key = next(key for key in objects(checkpoint) if key.startswith("common_state"))
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    data = (checkpoint / info.relative_path).read_bytes()[info.offset :][: info.length]
    stored = torch.load(io.BytesIO(data), weights_only=False)
    setattr(stored[0]["args"], name, value)
    _replace_object(checkpoint, key, _saved(stored))


def in_tensor(value: object, *, plain: bool = False) -> Any:
    """Return a layer's `_extra_state` as TransformerEngine 2 writes it; plain: its bytes."""
    data = pickle.dumps(value)
    return data if plain else torch.frombuffer(bytearray(data), dtype=torch.uint8)


def in_file(value: object, *, plain: bool = False) -> Any:
    """Return a layer's `_extra_state` as TransformerEngine 1 writes it; plain: its bytes."""
    data = _saved(value)
    return data if plain else io.BytesIO(data)


def _replace_object(checkpoint: Path, key: str, data: bytes) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    file = checkpoint / info.relative_path
    info.offset, info.length = file.stat().st_size, len(data)
    with file.open("ab") as end:
        end.write(data)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
