"""Experts in MXFP4, as gpt-oss is published: which tensors they are, by headers alone.

Codes [experts, out, in / 32, 16], two of e2m1 a byte, and a scale e8m0 of each 32,
[experts, out, in / 32], are transformers' tensor [experts, in, out].
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalora.model.stored import MODEL, TensorFiles

CODES, SCALES = "_blocks", "_scales"
BLOCK = 32
# Whose class in transformers loads it, and which of its parameters.
_MODELS = ("gpt_oss",)
_EXPERTS = re.compile(r"(.+\.experts\.(?:gate_up_proj|down_proj))_blocks")


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Say whether a config.json is of a model whose experts are MXFP4 that transformers reads."""
    given = config.get("quantization_config")
    is_named = isinstance(given, dict) and given.get("quant_method") == "mxfp4"
    return is_named and config.get("model_type") in _MODELS


class PlainHeaders(TensorFiles):
    """The tensors of a directory, names and shapes of MXFP4 being those of plain numbers."""

    def __init__(self, directory: Path, stem: str = MODEL, *, framework: str = "pt") -> None:
        super().__init__(directory, stem, framework=framework)
        # Of each the file of its codes, under whose name it is here, and that of its scales.
        self._packed: dict[str, tuple[str, str]] = {}
        for name in [name for name in self.files if _is_pair(name, self)]:
            plain = name.removesuffix(CODES)
            files = self.files.pop(name), self.files.pop(plain + SCALES)
            self._packed[plain], self.files[plain] = files, files[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name not in self._packed:
            return super().shape(name)
        experts, rows, blocks, _ = self._codes(name).get_shape()
        return experts, blocks * BLOCK, rows

    def _codes(self, name: str) -> Any:
        return self._handle(self._packed[name][0]).get_slice(name + CODES)

    def _scales(self, name: str) -> Any:
        return self._handle(self._packed[name][1]).get_slice(name + SCALES)


def _is_pair(name: str, files: TensorFiles) -> bool:
    found = _EXPERTS.fullmatch(name)
    return found is not None and found[1] + SCALES in files and len(files.shape(name)) == 4


def as_plain(files: TensorFiles) -> TensorFiles:
    """Return the same directory with plain numbers' names and shapes, by its headers alone."""
    if not any(_EXPERTS.fullmatch(name) for name in files):
        return files
    return PlainHeaders(files.directory, files.stem, framework=files.framework)


def check_mxfp4(files: TensorFiles) -> None:
    """Raise ValueError, by name, for codes and scales that are not what transformers reads."""
    for name in files:
        if name.endswith(CODES):
            _check_pair(name, files)
        elif name.endswith(SCALES) and name.removesuffix(SCALES) + CODES not in files:
            raise ValueError(
                f"{files.directory} has {name} and not what it scales: download it again"
            )


def _check_pair(name: str, files: TensorFiles) -> None:
    folder, plain = files.directory, name.removesuffix(CODES)
    scales = plain + SCALES
    if not _EXPERTS.fullmatch(name):
        raise ValueError(
            f"{folder} has {name}: MXFP4 is read as experts.gate_up_proj and experts.down_proj "
            "only: give the unquantised base, in bfloat16, float16 or float32"
        )
    if scales not in files:
        raise ValueError(f"{folder} has {name} without {scales}: download it again")
    if plain in files:
        raise ValueError(f"{folder} has {plain} and {name}: which of them is meant is not said")
    shape = files.shape(name)
    is_whole = len(shape) == 4 and shape[-1] * 2 == BLOCK and 0 not in shape
    dtypes = {files.dtype(name), files.dtype(scales)}
    if not is_whole or files.shape(scales) != shape[:-1] or dtypes != {"U8"}:
        raise ValueError(
            f"{folder} has {name} {list(shape)} as {files.dtype(name)} with scales "
            f"{list(files.shape(scales))} as {files.dtype(scales)}: MXFP4 is codes "
            "[experts, out, in / 32, 16] and scales [experts, out, in / 32], both U8"
        )
