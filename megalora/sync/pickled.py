"""Tensors as SGLang's MultiprocessingSerializer reads them: pickled, and nothing run by reading.

Its own writer puts CPU tensors into memory that another machine does not share. Its reader, an
unpickler with a list of what may be named (SafeUnpickler in sglang/srt/utils/common.py), also takes
the form that torch gives a storage by itself, with the values in the pickle: that is written here,
one storage for all tensors of a piece that have one precision.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

# Of tensors that share a storage.
PIECE_BYTES = 16 * 2**20
_HEAD, _END = pickle.PROTO + b"\x04", pickle.STOP
# NOTE: by name and not as objects: Megatron puts a function of its own in the place of torch's,
# which SGLang has no use for.
_TENSOR = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
_STORAGE = pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n"
_NO_HOOKS = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
# Far above what strings and shapes are remembered by.
_MEMO = 2**24


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
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    memos = {t: (_MEMO + number).to_bytes(4, "little") for number, t in enumerate(by_dtype)}
    used = dict.fromkeys(by_dtype, 0)
    written: list[bytes | memoryview] = [pickle.MARK]
    for name, tensor in tensors.items():
        begin, memo = used[tensor.dtype], memos[tensor.dtype]
        written += [_plain(name), _TENSOR, pickle.MARK]
        if begin:
            written += [pickle.LONG_BINGET, memo]
        else:
            written += [*_storage(by_dtype[tensor.dtype]), pickle.LONG_BINPUT, memo]
        strides = torch.empty(tensor.shape, device="meta").stride()
        written += map(_plain, (begin, tuple(tensor.shape), strides, False))
        written += [_NO_HOOKS, pickle.TUPLE, pickle.REDUCE]
        used[tensor.dtype] += tensor.numel()
    return b"".join([*written, pickle.SETITEMS])


def _storage(tensors: list[Tensor]) -> list[bytes | memoryview]:
    """Return the opcodes of a storage that has the values of tensors."""
    buffer = io.BytesIO()
    values = torch.cat([tensor.detach().cpu().reshape(-1) for tensor in tensors])
    # As a storage pickles itself.
    torch.save(values._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    data = buffer.getbuffer()
    size = len(data).to_bytes(8, "little")
    return [_STORAGE, pickle.BINBYTES8, size, data, pickle.TUPLE1, pickle.REDUCE]


def _plain(value: object) -> bytes:
    """Return the opcodes of a number, a string or a tuple: its pickle without head and end."""
    return pickle.dumps(value, protocol=3)[len(_HEAD) : -len(_END)]
