"""Experts in MXFP4, as gpt-oss is published, are read as transformers reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.hf.block_scaled import PlainFiles
from megalora.hf.merge import merge_adapter
from megalora.hf.mxfp4 import numbers_of
from megalora.model.config_json import checked_config, load_config
from megalora.model.mxfp4 import as_plain
from megalora.model.stored import TensorFiles
from tests.support import hf_bases, mxfp4
from tests.support.fp8 import change
from tests.support.hf_models import merged, random_factors, transformers
from tests.support.mxfp4 import Tensors

NUMBERS = pytest.mark.bad_input("a number that is not one")
EXPERTS = "model.layers.1.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
RANKS = {"experts": (2, 4.0), "": (4, 2.0)}
Q = "model.layers.0.self_attn.q_proj"
# Three experts of two blocks in and three out, so that no size is another's.
SIZES = {"num_local_experts": 3, "hidden_size": 64, "intermediate_size": 96}
SLICES = [(), (0,), (1, 2), (0, 3, 0, 64, 0, 192), (1, 3, 31, 33, 5, 6), (2, 3, 32, 64, 0, 190)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny gpt-oss with random experts in MXFP4."""
    directory = tmp_path_factory.mktemp("mxfp4") / "base"
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=66, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"], rope_parameters=None,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(str(directory))
    return change(directory, mxfp4.in_mxfp4, quantization_config=mxfp4.CONFIG)


@pytest.fixture
def base(published: Path, tmp_path: Path) -> Path:
    """Return a copy to change."""
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_code_and_scale_is_the_number_that_transformers_makes_of_it(
    dtype: torch.dtype,
) -> None:
    codes = torch.arange(256).byte().view(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255).byte().view(1, 255, 1).expand(1, 255, 16).contiguous()
    convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
    expected = convert(codes, scales, dtype=dtype)
    assert torch.equal(bits(numbers_of(codes, scales).to(dtype).mT), bits(expected))
    # By the format 255 is NaN, of which transformers makes infinities.
    assert numbers_of(codes[:, :1], scales[:, :1].fill_(255)).isnan().all()


def test_mxfp4_is_read_as_transformers_reads_it(published: Path) -> None:
    expected = hf_bases.loaded(published).state_dict()
    files = PlainFiles(published)
    assert set(files) == set(expected)
    for name, tensor in expected.items():
        assert files.shape(name) == tuple(tensor.shape), name
        assert torch.equal(bits(files.tensor(name).float()), bits(tensor)), name
    assert files.tensor(GATE_UP).dtype == torch.bfloat16


@pytest.mark.parametrize("ends", SLICES, ids=str)
def test_any_slice_is_that_of_the_whole(published: Path, ends: tuple[int, ...]) -> None:
    files = PlainFiles(published)
    index = tuple(slice(*pair) for pair in zip(ends[::2], ends[1::2], strict=False))
    part = files.part(GATE_UP, index)
    assert torch.equal(part, files.tensor(GATE_UP)[index])


class Watched:
    """A safetensors file that takes down how much of which tensor is read."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.read = handle, []

    def get_slice(self, name: str) -> "Watched.Slice":
        return Watched.Slice(name, self)

    class Slice:
        def __init__(self, name: str, file: "Watched") -> None:
            self.name, self.file = name, file
            self.get_shape = file.handle.get_slice(name).get_shape

        def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
            part = self.file.handle.get_slice(self.name)[index]
            self.file.read.append((self.name, part.numel()))
            return part


@pytest.fixture
def watched(published: Path) -> tuple[PlainFiles, Watched]:
    """Return files of which every read is taken down."""
    files = PlainFiles(published)
    file = Watched(files._handle("model.safetensors"))
    files._open["model.safetensors"] = file
    return files, file


def test_only_the_blocks_of_the_slice_are_read(watched: tuple[PlainFiles, Watched]) -> None:
    files, file = watched
    files.part(GATE_UP, (slice(1, 2), slice(40, 50), slice(7, 12)))
    assert file.read == [(f"{GATE_UP}_blocks", 5 * 16), (f"{GATE_UP}_scales", 5)]


def test_a_tensor_is_read_an_expert_at_a_time(watched: tuple[PlainFiles, Watched]) -> None:
    files, file = watched
    files.tensor(DOWN)
    assert [number for _, number in file.read] == [64 * 3 * 16, 64 * 3] * 3


def test_codes_and_scales_may_be_in_two_files(base: Path) -> None:
    whole = PlainFiles(base).tensor(GATE_UP)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    place = {name: f"model-{name.endswith('_scales'):d}.safetensors" for name in tensors}
    for file in set(place.values()):
        save_file({n: t for n, t in tensors.items() if place[n] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    files = PlainFiles(base)
    assert torch.equal(files.tensor(GATE_UP), whole)
    assert files.file_names() == ["model-0.safetensors"], "none is left with scales alone"


def test_headers_have_the_names_and_shapes_of_plain_experts(published: Path) -> None:
    stored = TensorFiles(published, framework="np")
    plain = as_plain(stored)
    assert plain.shape(GATE_UP) == (3, 64, 192)
    assert plain.shape(DOWN) == (3, 96, 64)
    assert not [name for name in plain if name.endswith(("_blocks", "_scales"))]
    assert as_plain(plain) is plain, "what is plain is not opened again"


def test_merging_into_mxfp4_writes_an_unquantised_copy(published: Path, tmp_path: Path) -> None:
    model, out = hf_bases.loaded(published), tmp_path / "out"
    factors = random_factors(model, RANKS, lm_head=False)
    assert any(".experts." in name for name in factors)
    merge_adapter(published, factors, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored, expected = load_file(out / "model.safetensors"), merged(model, factors).state_dict()
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(mxfp4.EXPERTS):
            assert stored[name].dtype == torch.bfloat16
            torch.testing.assert_close(stored[name].float(), tensor, atol=1e-6, rtol=2**-8)
        else:
            torch.testing.assert_close(stored[name], tensor, atol=1e-6, rtol=1e-6)
    assert hf_bases.loaded(out) is not None


# === What is refused ===


def changed(name: str, change_it: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Return what puts another tensor in the place of one."""
    return lambda tensors: {**tensors, name: change_it(tensors[name])}


@NUMBERS
@pytest.mark.parametrize(
    ("tensors", "fields", "sentence"),
    [
        (mxfp4.without(f"{DOWN}_scales"), {}, f"{DOWN}_blocks without {DOWN}_scales: download"),
        (mxfp4.without(f"{DOWN}_blocks"), {}, f"{DOWN}_scales and not what it scales: download"),
        (changed(f"{DOWN}_scales", Tensor.int), {}, r"scales \[3, 64, 3\] as I32: MXFP4 is"),
        (changed(f"{DOWN}_blocks", Tensor.char), {}, r"_blocks .* as I8 with scales"),
        (changed(f"{DOWN}_blocks", lambda t: t[..., :15].contiguous()), {}, r"\[3, 64, 3, 15\] as"),
        (changed(f"{DOWN}_blocks", lambda t: t.flatten(2)), {}, r"\[3, 64, 48\] as U8 with"),
        (changed(f"{DOWN}_scales", lambda t: t[:, :, 1:].contiguous()), {}, r"scales \[3, 64, 2\]"),
        (changed(f"{DOWN}_blocks", lambda t: t[:0].contiguous()), {}, r"\[0, 64, 3, 16\] as U8"),
        (lambda t: {**t, DOWN: torch.ones(1)}, {}, f"{DOWN} and {DOWN}_blocks: which"),
        (
            lambda t: {**t, "a.weight_blocks": torch.ones(1).byte()},
            {},
            r"a\.weight_blocks: MXFP4 is read as experts\.gate_up_proj .*unquantised base",
        ),
        (changed(f"{Q}.weight", Tensor.byte), {}, f"{Q}.weight as U8, codes of .*unquantised base"),
        (dict, {"quantization_config": None}, "_blocks, as MXFP4 writes it: .*unquantised base"),
        (dict, {"model_type": "qwen3_moe"}, "quant_method 'mxfp4', .*gpt-oss' MXFP4, only"),
    ],
    ids=range(13),
)
def test_mxfp4_that_is_not_what_transformers_reads_is_refused(
    tensors: Callable[[Tensors], Tensors], fields: dict[str, object], sentence: str, base: Path
) -> None:
    checked_config(load_config(base), base)
    with pytest.raises(ValueError, match=sentence):
        checked_config(load_config(change(base, tensors, **fields)), base)


def test_plain_experts_beside_a_config_of_mxfp4_are_read_as_they_are(base: Path) -> None:
    plain = {
        name: tensor.contiguous() for name, tensor in hf_bases.loaded(base).state_dict().items()
    }
    change(base, lambda _: plain)
    checked_config(load_config(base), base)
    found = hf_bases.loaded(base).state_dict()
    assert torch.equal(found[GATE_UP], PlainFiles(base).tensor(GATE_UP))
