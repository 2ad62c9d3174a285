"""The files of a Hugging Face directory: JSON, and tensors written one after the other."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora.model.stored import ADAPTER, MODEL, TensorFiles
from megalora.reading import open_plain, read_json

__all__ = [
    "ADAPTER",
    "MODEL",
    "Planned",
    "TensorFiles",
    "read_json",
    "read_tensors",
    "save_stream",
    "save_tensors",
    "write_json",
]

# Names of safetensors, in the order in which it lays tensors out: so that none is misaligned.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_ALIGNMENT = 8
# Small tensors go to the disk together.
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written, of which only shape and precision are known until it is its turn."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class _Mapping:
    """A safetensors file, which has been opened and found whole, in memory as it is on the disk."""

    def __init__(self, path: Path) -> None:
        with open_plain(path, inside=path.parent) as file:
            length = int.from_bytes(file.read(_ALIGNMENT), "little")
            self._header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        self._first = _ALIGNMENT + length
        self._bytes = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)

    def tensor(self, name: str) -> Tensor | None:
        """Return a view; None of what is misaligned or of a precision that torch does not have."""
        entry = self._header[name]
        dtype = _BY_NAME.get(entry["dtype"])
        begin = self._first + entry["data_offsets"][0]
        if dtype is None or begin % dtype.itemsize:
            return None
        # Torch's own stub leaves this form of set_ out.
        tensor: Any = torch.empty(0, dtype=dtype)
        return tensor.set_(self._bytes, begin // dtype.itemsize, entry["shape"])


def read_tensors(files: TensorFiles, names: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors by name, each a view of its file.

    One by one they take ten times as long, which counts where an adapter has thousands.
    """
    mapped: dict[str, _Mapping] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        file_name = files.files[name]
        if file_name not in mapped:
            mapped[file_name] = _Mapping(files.directory / file_name)
        tensor = mapped[file_name].tensor(name)
        found[name] = files.tensor(name) if tensor is None else tensor
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor | Planned]) -> None:
    """Write a safetensors file: its header, then one tensor at a time, nothing else being held.

    The bytes are those that safetensors writes, and depend on names and values alone. Tensors may
    share memory.
    """
    with path.open("xb", buffering=_BUFFER_BYTES) as file:
        file.write(_header(tensors))
        for name in _laid_out(tensors):
            file.write(_bytes(tensors[name], tensors[name]))


def save_stream(
    path: Path, sizes: Mapping[str, Tensor | Planned], values: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the file that `save_tensors` writes, of tensors that come one by one, in any order.

    sizes: of all tensors, whose values are not looked at. values: each of them once, by name.
    """
    header, ends = _header(sizes), _ends(sizes)
    with path.open("xb", buffering=_BUFFER_BYTES) as file:
        file.write(header)
        for name, tensor in values:
            data = _bytes(tensor, sizes[name])
            file.seek(len(header) + ends.pop(name) - len(data))
            file.write(data)
    assert not ends, f"nothing came for {next(iter(ends))}"


def _laid_out(tensors: Mapping[str, Tensor | Planned]) -> list[str]:
    """Return the names in the order of the file."""
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))


def _ends(tensors: Mapping[str, Tensor | Planned]) -> dict[str, int]:
    """Return where each tensor ends, in bytes after the header."""
    names = _laid_out(tensors)
    sizes = (torch.Size(tensors[n].shape).numel() * tensors[n].dtype.itemsize for n in names)
    return dict(zip(names, accumulate(sizes), strict=True))


def _header(tensors: Mapping[str, Tensor | Planned]) -> bytes:
    """Return what stands before the first tensor: the length of a JSON text, and it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, end in _ends(tensors).items():
        tensor = tensors[name]
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_ALIGNMENT, "little") + text


def _bytes(tensor: Tensor | Planned, planned: Tensor | Planned) -> memoryview:
    values = tensor.make() if isinstance(tensor, Planned) else tensor
    assert (tuple(values.shape), values.dtype) == (tuple(planned.shape), planned.dtype)
    flat = values.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
