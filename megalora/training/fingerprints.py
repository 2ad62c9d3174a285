"""What must be equal on all ranks of a run, as fields for `megalora.training.agree`."""

import argparse
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

import megalora
from megalora.checkpoint.layout import find_directory
from megalora.data.packing import PackedDataset

# Of Megatron's args: what a rank has for itself.
_OWN_ARGS = {"rank", "local_rank"}
# What a run may meet in its loop, by the names of their distributions.
_PACKAGES = (
    *("torch", "numpy", "megatron-core", "transformer-engine", "transformers", "tokenizers"),
    *("datasets", "mamba-ssm"),
)
_SWITCHES = ("MEGALORA_", "NVTE_")
_SAID_ONLY = {"MEGALORA_TRACEBACK"}
_PLAIN = (bool, int, float, torch.dtype)

# Of files: enough to tell one model from another, and to read on thousands of ranks at once.
_BLOCK, _NUM_BLOCKS = 1 << 16, 64
_READ = (".json", ".safetensors", ".distcp", ".pt", ".bin", ".metadata")
# Of data sets that are not held in memory.
_NUM_SAMPLES = 64


def of_flags(args: argparse.Namespace) -> dict[str, str]:
    """Return Megatron's args.

    A path may be another on each node; what is read from it is compared where it is read.
    """
    named = {name: value for name, value in vars(args).items() if name not in _OWN_ARGS}
    return {name: _shown(value) for name, value in named.items()}


def of_software(environ: Mapping[str, str]) -> dict[str, str]:
    """Return versions of packages, and switches in the environment."""
    switches = [n for n in environ if n.startswith(_SWITCHES) and n not in _SAID_ONLY]
    return {
        **{f"version of {name}": _version(name) for name in _PACKAGES},
        "version of megalora": megalora.__version__,
        **{f"environment variable {name}": _shown(environ[name]) for name in switches},
    }


def _shown(value: object) -> str:
    if isinstance(value, str):
        return "a path" if value.startswith(("/", ".", "~")) else repr(value)
    if isinstance(value, _PLAIN):
        return str(value)
    if value is None:
        return "not given"
    if isinstance(value, Mapping):
        return str({key: _shown(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    # A function or an object, whose text may hold its address.
    return getattr(value, "__qualname__", type(value).__qualname__)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def of_sources(sources: Mapping[str, str | None]) -> dict[str, str]:
    """Return what tells the files in directories from others, by the flag that names each."""
    return {f"what {flag} holds": _directory(Path(path)) for flag, path in sources.items() if path}


def _directory(path: Path) -> str:
    """Return the names of the files that are read, and a hash of their sizes and sampled blocks.

    path: of a Hugging Face directory, or of Megatron's checkpoints. Files that have few blocks are
    read whole. What cannot be read is said: whoever loads it will raise.
    """
    try:
        found = find_directory(path)
        files = sorted(name for name in _names(found) if name.endswith(_READ))
        told = hashlib.blake2b(repr(files).encode(), digest_size=4)
        for number in _spread(len(files), _NUM_BLOCKS):
            _add_blocks(told, found / files[number], max(2, _NUM_BLOCKS // len(files)))
    except (OSError, ValueError) as error:
        return f"not readable ({getattr(error, 'strerror', None) or error})"
    return f"{len(files)} files with digest {told.hexdigest()}"


def _names(directory: Path) -> Iterator[str]:
    """Yield the names in a directory, and in those of Megatron's old format there.

    As text: thousands of ranks have made two files each, and all ranks look at all names.
    """
    for name in os.listdir(directory):
        yield name
        if name.startswith("mp_rank_") and (directory / name).is_dir():
            yield from (f"{name}/{inside}" for inside in os.listdir(directory / name))


def _add_blocks(told: "hashlib.blake2b", path: Path, num_blocks: int) -> None:
    """Add a file's size, and so many of its blocks, the first and the last among them."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        told.update(size.to_bytes(8))
        for number in _spread(-(-size // _BLOCK), num_blocks):
            file.seek(number * _BLOCK)
            told.update(file.read(_BLOCK))


def _spread(total: int, number: int) -> Iterable[int]:
    """Return as many indices, evenly spread from the first to the last."""
    if total <= number:
        return range(total)
    return sorted({place * (total - 1) // (number - 1) for place in range(number)})


def of_data(datasets: Sequence[object]) -> dict[str, str] | None:
    """Return what tells the train, validation and test data; None on a rank that reads none.

    Examples of --dataset are compared whole, as they are encoded; of Megatron's data sets the
    length and samples. A script's own may draw at random: their classes are compared.
    """
    flat = [
        part for each in datasets for part in (each if isinstance(each, list | tuple) else [each])
    ]
    if all(dataset is None for dataset in flat):
        return None
    return {f"data set {number}": _dataset(dataset) for number, dataset in enumerate(flat)}


def _dataset(dataset: object) -> str:
    if dataset is None:
        return "none"
    told = hashlib.blake2b(digest_size=4)
    if isinstance(dataset, PackedDataset):
        examples = dataset.examples
        for values in (examples.ids, examples.trained, examples.lengths):
            told.update(np.ascontiguousarray(values))
    elif type(dataset).__module__.startswith(("megatron.core.datasets", "megalora.data")):
        samples = cast(Sequence[Mapping[str, torch.Tensor]], dataset)
        for index in _spread(len(samples), _NUM_SAMPLES):
            for name, values in sorted(samples[index].items()):
                told.update(name.encode() + np.ascontiguousarray(values).tobytes())
    else:
        return type(dataset).__qualname__
    return f"{len(cast(Sequence[object], dataset))} samples with digest {told.hexdigest()}"
