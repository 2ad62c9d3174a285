"""Files of a Hugging Face directory, read safely."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megalora.model.stored import ADAPTER, MODEL, TensorFiles
from megalora.reading import read_json

__all__ = ["ADAPTER", "MODEL", "TensorFiles", "read_json", "save_tensors", "write_json"]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; the order of keys and the bytes depend on the values alone."""
    # Safetensors refuses tensors that share memory, such as one A of three projections.
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        partial = tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes()
        whole[name] = tensor.clone() if partial or pointer in seen else tensor
        seen.add(whole[name].untyped_storage().data_ptr())
    try:
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, f"{error}", str(path)) from error
    # safetensors makes files that only their owner can read: give them the permissions of others.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
