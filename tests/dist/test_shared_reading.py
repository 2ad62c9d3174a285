"""What a start reads is shared out among ranks: a byte once, and what one finds wrong on all."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.checkpoint import layout as files_of
from megalora.checkpoint import sums
from megalora.checkpoint.layout import MANIFEST, find_damage
from megalora.checkpoint.sums import verify_on_all_ranks, with_all_ranks
from megalora.hf.base import load_hf_base
from megalora.hf.safetensors_files import HFWeights
from tests.dist.support import hf
from tests.dist.support.cases import DP2, TP2
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.resuming import shared_directory
from tests.dist.test_hf_base import broken_copy, reference
from tests.dist.test_world import in_worlds, told_alike

EP2_OF_4, TP2_OF_4 = Layout(dp=4, ep=2), Layout(tp=2, dp=2)
DISAGREES = pytest.mark.bad_input("a rank that disagrees")
NUM_FILES = 7


# === Checksums ===


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files with checksums, in a directory that all ranks see."""
    directory = shared_directory(tmp_path)
    if dist.get_rank() == 0:
        contents = {f"__{number}_0.distcp": bytes([number]) * 9 for number in range(NUM_FILES)}
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        manifest = {"algorithm": "sha256", "files": digests}
        (directory / MANIFEST).write_text(json.dumps(manifest))
    dist.barrier()
    return directory


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes this rank has read."""
    names, damage = [], files_of._damage

    def noted(path: Path, digest: str) -> str | None:
        names.append(path.name)
        return damage(path, digest)

    monkeypatch.setattr(files_of, "_damage", noted)
    return names


@in_worlds
def test_each_file_is_read_by_one_rank(checkpoint: Path, looked_at: list[str]) -> None:
    verify_on_all_ranks(checkpoint)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, looked_at)
    assert sorted(name for names in everywhere for name in names) == [
        f"__{number}_0.distcp" for number in range(NUM_FILES)
    ]
    sizes = [len(names) for names in everywhere]
    assert max(sizes) - min(sizes) <= 1


@in_worlds
@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("numbers", [[0], [NUM_FILES - 1], [1, 2]])
def test_damage_is_told_on_all_as_one_rank_finds_it(checkpoint: Path, numbers: list[int]) -> None:
    if dist.get_rank() == 0:
        for number in numbers:
            (checkpoint / f"__{number}_0.distcp").write_bytes(b"other")
    dist.barrier()
    (*alone,) = find_damage(checkpoint)
    assert len(alone) == len(numbers)
    assert told_alike(with_all_ranks(lambda check: find_damage(checkpoint, check))) == alone
    with pytest.raises(ValueError, match=r"is damaged: __\d_0.distcp does not match") as error:
        verify_on_all_ranks(checkpoint)
    told_alike(str(error.value))


@in_worlds
@DISAGREES
def test_a_rank_that_does_not_see_the_files_damages_none(
    checkpoint: Path, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        monkeypatch.setattr(files_of, "_damage", lambda path, digest: f"{path.name} is missing")
    verify_on_all_ranks(checkpoint)
    if dist.get_rank() == 0:
        # It has looked itself at those that the last rank misses.
        assert len(looked_at) > -(-NUM_FILES // dist.get_world_size())


@in_worlds
@DISAGREES
def test_a_rank_with_a_copy_of_its_own_tells_of_no_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = dist.get_world_size() - 1
    if dist.get_rank() == 0:
        (checkpoint / f"__{last}_0.distcp").write_bytes(b"other")
    dist.barrier()
    if dist.get_rank() == last:
        # It finds its files intact, but they are not those of rank 0.
        monkeypatch.setattr(sums, "check_sums", lambda directory, digests: {})
        monkeypatch.setattr(sums, "_identity", lambda directory: (1, 2, 3))
    with pytest.raises(ValueError, match=rf"__{last}_0.distcp does not match its checksum"):
        verify_on_all_ranks(checkpoint)


@in_worlds
@DISAGREES
def test_work_that_fails_on_rank_0_fails_on_all() -> None:
    def work(check: files_of.Sums) -> None:
        raise OSError("lost")

    with pytest.raises(ValueError, match=r"^lost$"):
        with_all_ranks(work)


# === A Hugging Face base ===


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many numbers of each tensor this rank has read."""
    counts: Counter[str] = Counter()
    whole = HFWeights.read

    def counted(self: HFWeights, name: str, *where: Any) -> Tensor:
        part = whole(self, name, *where)
        counts[name] += part.numel()
        return part

    monkeypatch.setattr(HFWeights, "read", counted)
    return counts


@over(DP2, EP2_OF_4, TP2_OF_4)
def test_replicas_read_a_byte_once_between_them(layout: Layout, read: Counter[str]) -> None:
    directory, _ = reference("qwen3_moe")
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        # What a rank has not read, it must be sent.
        for param in chunks[0].parameters():
            param.data.fill_(float("nan"))
        load_hf_base(chunks, directory)
        own = {name: param.detach().clone() for name, param in chunks[0].named_parameters()}
        assert all(param.isfinite().all() for param in own.values())
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, dict(read))
    total = sum(map(Counter, everywhere), Counter[str]())
    sizes = {name: torch.Size(s).numel() for name, s in HFWeights(directory).shapes.items()}
    for name, number in total.items():
        # Of what tensor parallelism does not shard, each of its ranks reads its own.
        is_whole = "norm" in name or name.endswith("gate.weight")
        assert number == sizes[name] * (layout.tp if is_whole else 1), name
    # Nobody has read all of it.
    assert max(sum(one.values()) for one in everywhere) < 0.8 * sum(total.values())


@over(DP2, EP2_OF_4)
def test_every_rank_is_told_of_every_parameter(layout: Layout) -> None:
    directory, _ = reference("qwen3_moe")
    names: list[str] = []
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        load_hf_base(chunks, directory, progress=names.append)
    assert len(names) == len(set(names)) == len(list(chunks[0].parameters()))


@DISAGREES
@pytest.mark.parametrize("how", ["a file that is cut", "no directory", "a number that is none"])
@over(DP2, TP2)
def test_what_one_rank_cannot_read_ends_all_ranks(layout: Layout, how: str, tmp_path: Path) -> None:
    directory = broken_copy("qwen3", tmp_path)
    said = {"a file that is cut": "is not a whole safetensors file", "no directory": "is missing"}
    with model_parallel(layout):
        chunks = hf.build(layout, directory)
        if dist.get_rank() == 1:
            spoil(directory, how)
        with pytest.raises(ValueError, match=said.get(how, "NaN or infinite values")) as error:
            load_hf_base(chunks, directory)
    told_alike(str(error.value))
    assert str(directory) in str(error.value) or dist.get_rank() != 1


def spoil(directory: Path, how: str) -> None:
    file = directory / "model.safetensors"
    if how == "no directory":
        shutil.rmtree(directory)
    elif how == "a file that is cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = {name: torch.full_like(t, torch.nan) for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
