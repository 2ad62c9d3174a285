"""A release has weights and no iteration: everyone reads them, and training starts at 0."""

import shutil
from pathlib import Path

import pytest

from megalora.checkpoint.layout import RELEASE, write_tracker
from tests.forked import call
from tests.tiny import LORA, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration: `run` has its adapters, `merged` the whole model."""
    place = tmp_path_factory.mktemp("release")
    train(1, place / "run", *LORA, "--save-merged", place / "merged", iters=1).succeed()
    return place


def release_of(checkpoint: Path, root: Path) -> Path:
    """Copy one iteration's checkpoint as the release of a directory."""
    shutil.copytree(checkpoint, root / RELEASE)
    write_tracker(root, RELEASE)
    return root


def different_adapters(one: Path, other: Path) -> list[str]:
    from megalora.checkpoint.read import read_adapter_checkpoint

    (first, *same), (second, *alike) = read_adapter_checkpoint(one), read_adapter_checkpoint(other)
    assert same == alike
    assert first
    return [name for name in first | second if not first[name].equal(second[name])]


def test_a_release_of_adapters_is_read_and_trained_on_from_iteration_0(
    trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "run" / "iter_0000001"
    root = release_of(checkpoint, tmp_path / "run")
    assert call(different_adapters, root, checkpoint) == []
    # Its optimizer, of another kind, and its schedule are left alone. Megatron counts the samples
    # of a checkpoint's arguments all the same, so it would miss the last ones.
    more = ["--use-distributed-optimizer", "--lr", "1e-30", "--exit-interval", 1]
    run = train(1, root, *LORA, *more, iters=9).succeed()
    assert sorted(run.losses()) == [1]
    assert call(different_adapters, root / "iter_0000001", checkpoint) == []


def test_a_merged_model_is_trained_by_plain_megatron_from_its_first_sample(
    trained: Path, tmp_path: Path
) -> None:
    merged = shutil.copytree(trained / "merged", tmp_path / "merged")
    assert sorted(train(1, merged, iters=1).succeed().losses()) == [1]
