"""Tensors written one at a time: the bytes of safetensors, whole or not at all, never all held."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors
from megalora.hf.files import ADAPTER, Planned, TensorFiles, read_tensors, save_tensors
from megalora.hf.peft import FORMATS, read_adapter, write_adapter
from tests.support.hf_models import shared_outer

DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
FILE = "adapter_model.safetensors"


def every_kind() -> dict[str, Tensor]:
    """Return tensors of every precision, of odd sizes, one without elements, one without sizes."""
    tensors = {f"of {dtype}": torch.arange(1, 8).to(dtype) for dtype in DTYPES}
    return {
        **tensors,
        "empty": torch.empty(3, 0, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        'Größe "a\\b"\n': torch.ones(2, 3, 5),
        "": torch.zeros(1),
    }


def test_the_bytes_are_those_that_safetensors_writes(tmp_path):
    tensors = every_kind()
    save_tensors(tmp_path / "a", tensors)
    assert (tmp_path / "a").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_tensors_in_any_memory_are_read_back_by_safetensors(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"all": whole, "same": whole, "rows": whole[1:3], "transposed": whole.T}
    save_tensors(tmp_path / "a", {**views, "planned": Planned((6,), whole.dtype, lambda: whole[2])})
    found = load_file(tmp_path / "a")
    assert all(torch.equal(found[name], view) for name, view in views.items())
    assert torch.equal(found["planned"], whole[2])
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def is_same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors agree in sizes, precision and bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return bytes(a.reshape(-1).view(torch.uint8)) == bytes(b.reshape(-1).view(torch.uint8))


def test_all_tensors_of_all_shards_are_those_that_safetensors_reads(tmp_path):
    kinds = every_kind()
    shards = {"adapter_model-1-of-2": kinds, "adapter_model-2-of-2": {"more": torch.rand(5, 3)}}
    for stem, tensors in shards.items():
        save_tensors(tmp_path / f"{stem}.safetensors", tensors)
    weight_map = {n: f"{stem}.safetensors" for stem, tensors in shards.items() for n in tensors}
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = TensorFiles(tmp_path, ADAPTER)
    found = read_tensors(files, list(files))
    assert found.keys() == weight_map.keys()
    assert all(is_same(found[name], files.tensor(name)) for name in files)
    assert not is_same(found["more"], kinds["scalar"])


def test_a_tensor_at_an_odd_byte_is_read_too(tmp_path):
    odd, wide = torch.tensor([7], dtype=torch.uint8), torch.arange(3.0).bfloat16()
    offsets = {"odd": ("U8", odd, [0, 1]), "wide": ("BF16", wide, [1, 7])}
    header = {
        name: {"dtype": letters, "shape": list(tensor.shape), "data_offsets": place}
        for name, (letters, tensor, place) in offsets.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2)
    data = odd.numpy().tobytes() + wide.view(torch.uint8).numpy().tobytes()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = read_tensors(TensorFiles(tmp_path, ADAPTER), ["wide", "odd"])
    assert torch.equal(found["wide"], wide)
    assert torch.equal(found["odd"], odd)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_ends_half_way_leaves_nothing(error, tmp_path):
    held = []

    def make() -> Tensor:
        held.extend(tmp_path.rglob(FILE))
        raise error

    planned = {"a": torch.ones(1000), "b": Planned((3,), torch.float32, make)}
    with pytest.raises((ValueError, KeyboardInterrupt)), whole_directory(tmp_path / "new") as place:
        save_tensors(place / FILE, planned)
    assert held
    assert not list(tmp_path.iterdir())


# === Memory ===


class Held(TorchDispatchMode):
    """Counts the bytes of what operations make and what is not gone yet; most: at their worst."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {each.untyped_storage()._cdata for each in tree_leaves(args) if is_tensor(each)}
        made = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return made


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def experts(rank: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, LoRAFactors]:
    """Return the adapter of a mixture of experts, 12 layers of 4 experts, and attention."""
    sizes = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}": size
        for layer in range(12)
        for expert in range(4)
        for projection, size in sizes.items()
    }
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    found = {
        name: LoRAFactors(draw(num_in, rank).T, draw(num_out, rank), 8.0)
        for name, (num_out, num_in) in names.items()
    }
    found["model.layers.0.self_attn.q_proj"] = LoRAFactors(draw(16, 64), draw(64, 16), 1.0)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_makes_a_layer_at_a_time(format, tmp_path):
    factors = experts(rank=2)
    if format == "tinker":
        factors = {n: m for n, m in shared_outer(factors).items() if ".experts." in n}
    with Held() as held:
        write_adapter(tmp_path / "a", factors, base_model_name="x", format=format)
    header = json.loads(read_header(tmp_path / "a" / FILE))
    written = [each["data_offsets"] for name, each in header.items() if name != "__metadata__"]
    largest = max(end - begin for begin, end in written)
    total = max(end for _, end in written)
    # A tensor, what it is made of, and the copy that is written, where A lies transposed.
    assert 0 < held.most <= 4 * largest < total / 3


def read_header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


# === One rank ===


@pytest.mark.parametrize(
    ("scale", "precision"), [(4.0, torch.bfloat16), (3.0, torch.float32), (1.0, torch.bfloat16)]
)
def test_one_rank_keeps_a_precision_that_loses_nothing(scale, precision, tmp_path):
    factors = experts(rank=2)
    factors = {n: LoRAFactors(m.lora_A, m.lora_B, scale) for n, m in factors.items()}
    write_adapter(tmp_path / "a", factors, base_model_name="x", format="uniform")
    found = read_adapter(tmp_path / "a")
    assert found.keys() == factors.keys()
    for name, module in found.items():
        own = factors[name]
        assert (module.rank, module.scale) == (16, 1)
        assert (module.lora_A.dtype, module.lora_B.dtype) == (torch.bfloat16, precision)
        assert torch.equal(module.lora_A[: own.rank], own.lora_A)
        assert torch.equal(module.lora_B[:, : own.rank].float(), own.lora_B.float() * scale)
        assert not module.lora_A[own.rank :].any()
        assert not module.lora_B[:, own.rank :].any()


def test_experts_of_several_precisions_become_one_tensor_at_the_highest(tmp_path):
    factors = experts(rank=2)
    name = "model.layers.3.mlp.experts.1.up_proj"
    one = factors[name]
    factors[name] = LoRAFactors(one.lora_A, one.lora_B.float() * 1.1, one.scale)
    write_adapter(tmp_path / "a", factors, base_model_name="x", format="peft-3d")
    found = read_adapter(tmp_path / "a", hidden_size=64)
    assert all(torch.equal(module.delta(), factors[n].delta()) for n, module in found.items())
    high = [n for n, module in found.items() if module.lora_B.dtype == torch.float32]
    assert high
    assert all(n.startswith("model.layers.3.mlp.experts.") for n in high)
