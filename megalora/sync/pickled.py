"""Tensors as SGLang's MultiprocessingSerializer reads them: pickled, and nothing run by reading.

Its own writer puts CPU tensors into memory that another machine does not share. Its reader, an
unpickler with a list of what may be named (SafeUnpickler in sglang/srt/utils/common.py), also takes
the form that torch gives a storage by itself, with the values in the pickle: that is written here,
one storage for all tensors of a piece that have one precision.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

# The last one without frames, so that pickles can stand one behind the other in one.
_PROTOCOL = 3
_HEAD, _END = pickle.PROTO + bytes([_PROTOCOL]), pickle.STOP
# Of tensors that share a storage.
PIECE_BYTES = 16 * 2**20


def pickle_tensors(
    tensors: Iterable[tuple[str, Tensor]], *, piece_bytes: int = PIECE_BYTES
) -> Iterator[bytes]:
    """Yield the pickle of a dictionary of tensors by name, piece by piece.

    A piece has the tensors of piece_bytes, or one that is larger; about four times that is held.
    """
    yield _HEAD + pickle.EMPTY_DICT
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        held[name], size = tensor, size + tensor.nbytes
        if size >= piece_bytes:
            yield _entries(held)
            held, size = {}, 0
    yield (_entries(held) if held else b"") + _END


def _entries(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the opcodes that add tensors to the dictionary on the unpickler's stack."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, tensors)
    for name, tensor in tensors.items():
        pickler.dump(name)
        pickler.dump(tensor)
    # Each dump begins and ends as a pickle of its own would.
    return pickle.MARK + pickler.joined() + pickle.SETITEMS


class _Pickler(pickle.Pickler):
    """Pickles tensors as views of one storage for each precision, whose memo lasts."""

    def __init__(self, buffer: io.BytesIO, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(buffer, protocol=_PROTOCOL)
        self._buffer, self._parts, self._start = buffer, [], 0
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors.values():
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._storages = {
            dtype: torch.cat([t.detach().cpu().reshape(-1) for t in of_dtype])._typed_storage()
            for dtype, of_dtype in by_dtype.items()
        }
        self._used = dict.fromkeys(self._storages, 0)

    def dump(self, obj: object) -> None:
        """Pickle an object, which may name what those before it hold."""
        super().dump(obj)
        end = self._buffer.tell()
        self._parts.append((self._start + len(_HEAD), end - len(_END)))
        self._start = end

    def joined(self) -> bytes:
        """Return what was dumped, as parts of one pickle."""
        data = self._buffer.getbuffer()
        return b"".join(data[begin:end] for begin, end in self._parts)

    def reducer_override(self, obj: object) -> Any:
        """Make a tensor a view of its storage, and leave anything else as it is."""
        if not isinstance(obj, Tensor):
            return NotImplemented
        begin = self._used[obj.dtype]
        self._used[obj.dtype] += obj.numel()
        strides = torch.empty(obj.shape, device="meta").stride()
        storage = self._storages[obj.dtype]
        where = (storage, begin, tuple(obj.shape), strides, False, OrderedDict())
        return _rebuild_tensor_v2, where
