"""Files of a Hugging Face directory, read safely."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalora.model.config_json import read_json

MODEL = "model"
ADAPTER = "adapter_model"
_PICKLES = {MODEL: "pytorch_model.bin", ADAPTER: "adapter_model.bin"}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class TensorFiles:
    """The tensors of a directory, by name, over all of its safetensors files.

    Only headers are read until a tensor or a slice is asked for. Pickles are never opened.
    """

    def __init__(self, directory: Path, stem: str = MODEL) -> None:
        self.directory, self.stem = Path(directory), stem
        self.index = self.directory / f"{stem}.safetensors.index.json"
        self._open: dict[str, Any] = {}
        self.files = self._locate()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def file_names(self) -> list[str]:
        """Return the safetensors files in the order in which they first hold a tensor."""
        return list(dict.fromkeys(self.files.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._handle(self._file(name)).get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Read a slice of one tensor, nothing else."""
        return self._slice(name)[index]

    def _file(self, name: str) -> str:
        if name not in self.files:
            raise ValueError(f"{self.directory} has no tensor {name}: is it a complete checkpoint?")
        return self.files[name]

    def _slice(self, name: str) -> Any:
        return self._handle(self._file(name)).get_slice(name)

    def _handle(self, file_name: str) -> Any:
        if file_name not in self._open:
            path = self.directory / file_name
            try:
                # Of a file that may not be read safe_open says that it is not there.
                path.open("rb").close()
                # NOTE: never a context manager: slices stay lazy as long as the handle lives.
                self._open[file_name] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror})") from None
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is not a whole safetensors file ({error}): download it again"
                ) from None
        return self._open[file_name]

    def _locate(self) -> dict[str, str]:
        single = self.directory / f"{self.stem}.safetensors"
        if self.index.is_file():
            return self._locate_by_index()
        if single.is_file():
            return dict.fromkeys(self._handle(single.name).keys(), single.name)
        shards = sorted(self.directory.glob(f"{self.stem}-*-of-*.safetensors"))
        if shards:
            raise ValueError(f"{self.index} is missing beside its shards: download it again")
        pickle = self.directory / _PICKLES[self.stem]
        if pickle.is_file():
            raise ValueError(
                f"{pickle} is a pickle, which can run code and is never loaded: "
                "convert it to safetensors"
            )
        raise ValueError(f"{self.directory} has neither {single.name} nor {self.index.name}")

    def _locate_by_index(self) -> dict[str, str]:
        weight_map = read_json(self.index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.index} has no weight_map: download it again")
        for name, file_name in weight_map.items():
            _check_plain(self.index, file_name)
            if name not in self._handle(file_name).keys():  # noqa: SIM118
                raise ValueError(f"{file_name} has no tensor {name}, which {self.index} promises")
        return weight_map


def _check_plain(index: Path, file_name: object) -> None:
    plain = isinstance(file_name, str) and PurePath(file_name).name == file_name
    if not plain or not str(file_name).endswith(".safetensors"):
        raise ValueError(
            f"{index} names the file {file_name!r}: only .safetensors files of its own directory "
            "are read"
        )


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
